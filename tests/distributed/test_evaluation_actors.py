"""Adaptation tasks, generators and scorers on a real local cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raygard.cluster.evaluation import EvaluationJob, EvaluationPool, base_loss, run_jobs, save_result
from raygard.diffusion.generate import generate
from raygard.diffusion.model import load_pipeline
from raygard.errors import RaygardError
from raygard.report.load import RunFiles
from raygard.store import Store, read_pictures
from tests.evaluation_bench import (
    NUM_IMAGES,
    Bench,
    Trial,
    adaptations,
    assert_each_picture_scored_once,
    make_bench,
    wait_for,
)

pytestmark = pytest.mark.distributed

MILESTONES = (0, 2, 4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_maker, imagefolder_maker) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"), tiny_maker, imagefolder_maker)


@pytest.fixture(scope="module")
def pool(bench, ray_cluster) -> Iterator[EvaluationPool]:
    with EvaluationPool.start(bench.config()) as started:
        yield started


@pytest.fixture(scope="module")
def measured(bench, pool, tmp_path_factory):
    """Results, store and milestones of a run that nothing disturbed."""
    store, passed = tmp_path_factory.mktemp("measured"), []
    jobs = bench.jobs("none", "freeze", "base", classes="ac")
    results = run_jobs(
        jobs,
        bench.inputs(bench.config(), store, MILESTONES),
        pool,
        on_milestone=lambda step, losses, _: passed.append((step, losses)),
    )
    return results, store, passed


def done(pool: EvaluationPool) -> tuple[int, int]:
    status = pool.status()
    return status["generators"]["done"], status["scorers"]["done"]


def test_results_come_in_the_order_of_the_jobs_and_whole(bench, measured) -> None:
    results, store, _ = measured
    assert [r["job_id"] for r in results] == [job.job_id for job in bench.jobs("none", "freeze", "base", classes="ac")]
    assert assert_each_picture_scored_once(results, store) == 3 * len(results)
    assert [r["audit_ok"] for r in results] == [None, None, True, True, None, None]
    assert all(len(r["losses"]) == (0 if r["defence"] == "base" else 4) for r in results)


def test_pictures_are_those_of_one_process(bench, measured) -> None:
    results, store, _ = measured
    config, base = bench.config(), next(r for r in results if r["defence"] == "base")
    keys = [f"a/{index}/{caption}" for index, caption in enumerate(base["captions"])]
    expected = generate(load_pipeline(config.model), base["captions"], keys, config.generation, config.seed)
    assert np.array_equal(read_pictures(Store(store).pictures_file(base["store"])), expected)
    others = [read_pictures(Store(store).pictures_file(r["store"])) for r in results if r["class"] == "a"]
    assert len({images.tobytes() for images in others}) == 3


def test_captions_of_few_references_are_drawn_in_turn_with_noise_of_their_own(bench, pool, tmp_path) -> None:
    """However few pictures there are to compare with, a user is judged by as many drawings as were asked for."""
    inputs = bench.inputs(bench.config(), tmp_path)
    own = json.loads(Path(inputs.references).with_suffix(".json").read_text())["captions"]["b"]
    count = len(own) + 2
    config = bench.config(f"generation.num_images={count}")
    (result,) = run_jobs(bench.jobs("base", classes="b"), bench.inputs(config, tmp_path), pool)
    assert result["captions"] == [*own, *own[:2]] and len(result["distances"]) == count
    pictures = read_pictures(Store(tmp_path).pictures_file(result["store"]))
    assert len({picture.tobytes() for picture in pictures}) == count


def test_pictures_are_scored_before_all_are_drawn(bench, pool, measured, tmp_path) -> None:
    # Many steps, so that drawing an item takes far longer than scoring one.
    config, before, seen, over = bench.config("generation.num_inference_steps=150"), done(pool), [], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            drawn, scored = done(pool)
            seen.append((drawn - before[0], scored - before[1]))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    run_jobs(bench.jobs("base", classes="b"), bench.inputs(config, tmp_path), pool)
    over.set()
    thread.join()
    assert any(scored >= 1 and drawn < 3 for drawn, scored in seen), seen


def test_milestones_wait_for_every_job_and_the_base_stays_the_same(measured) -> None:
    results, _, passed = measured
    assert [step for step, _ in passed] == list(MILESTONES)
    for position, (_, losses) in enumerate(passed):
        assert losses == {r["job_id"]: r["milestones"][position][1] for r in results}
    for result in results:
        values = [loss for _, loss in result["milestones"]]
        assert [step for step, _ in result["milestones"]] == list(MILESTONES)
        assert len(set(values)) == (1 if result["defence"] == "base" else len(MILESTONES))
        base = next(r for r in results if (r["defence"], r["class"]) == ("base", result["class"]))
        assert values[0] == base["milestones"][0][1]


def test_weights_are_removed_with_the_last_picture(measured) -> None:
    _, store, _ = measured
    assert not list(store.rglob("adapted.safetensors")) and not list(store.rglob("*.tmp"))


def test_nothing_is_computed_twice(bench, pool, measured) -> None:
    results, store, _ = measured
    before, counts = {file: file.stat().st_mtime_ns for file in store.rglob("*")}, done(pool)
    passed: list[int] = []
    again = run_jobs(
        bench.jobs("none", "freeze", "base", classes="ac"),
        bench.inputs(bench.config(), store, MILESTONES),
        pool,
        on_milestone=lambda step, *_: passed.append(step),
    )
    assert again == results and passed == list(MILESTONES)
    assert done(pool) == counts
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*")} == before


def test_saved_pictures_are_scored_without_being_drawn_again(bench, pool, measured) -> None:
    results, store, _ = measured
    key, counts = results[0]["store"], done(pool)
    (Store(store).folder(key) / "score-style_enlite0.json").unlink()
    (again,) = run_jobs(bench.jobs("none", classes="a"), bench.inputs(bench.config(), store, MILESTONES), pool)
    assert again["distances"] == results[0]["distances"]
    assert done(pool) == (counts[0], counts[1] + 3)


def test_jobs_of_equal_content_share_one_adaptation(bench, pool, measured) -> None:
    results, store, _ = measured
    counts = done(pool)
    mask = str(bench.root / "mask")
    jobs = [EvaluationJob("freeze", "a", "illegal", draw, 7, 0, mask) for draw in (4, 5)]
    shared = run_jobs(jobs, bench.inputs(bench.config(), store), pool)
    assert [result["draw"] for result in shared] == [4, 5]
    assert shared[0]["store"] == shared[1]["store"] == results[2]["store"]
    assert done(pool) == counts


def test_new_milestones_adapt_again_to_the_same_model(bench, pool, measured) -> None:
    results, store, _ = measured
    counts, pictures = done(pool), Store(store).pictures_file(results[2]["store"])
    written = pictures.stat().st_mtime_ns
    (again,) = run_jobs(bench.jobs("freeze", classes="a"), bench.inputs(bench.config(), store, (1, 4)), pool)
    assert [step for step, _ in again["milestones"]] == [1, 4]
    assert again["milestones"][1] == results[2]["milestones"][2]
    assert again["losses"] == results[2]["losses"] and again["distances"] == results[2]["distances"]
    assert done(pool) == counts and pictures.stat().st_mtime_ns == written
    assert not list(store.rglob("adapted.safetensors"))
    # Both sets of milestones are known now.
    (first,) = run_jobs(bench.jobs("freeze", classes="a"), bench.inputs(bench.config(), store, MILESTONES), pool)
    assert first["milestones"] == results[2]["milestones"]


def test_milestones_do_not_change_the_adaptation(bench, pool, measured, tmp_path) -> None:
    results, _, _ = measured
    (plain,) = run_jobs(bench.jobs("none", classes="c"), bench.inputs(bench.config(), tmp_path), pool)
    assert plain["losses"] == results[1]["losses"] and plain["distances"] == results[1]["distances"]
    assert plain["milestones"] == []


def test_a_job_that_cannot_adapt_is_reported_and_the_others_finish(bench, pool, tmp_path) -> None:
    config = bench.config()
    index = json.loads((bench.root / "references.json").read_text())
    with np.load(bench.root / "references.npz") as arrays:
        pictures = {**arrays, str(len(index["classes"])): arrays["0"]}
    np.savez(tmp_path / "references.npz", **pictures)
    captions = {**index["captions"], "stranger": index["captions"]["a"]}
    listing = {"classes": [*index["classes"], "stranger"], "captions": captions}
    (tmp_path / "references.json").write_text(json.dumps(listing))
    inputs = bench.inputs(config, tmp_path / "store", (4,))
    inputs = type(inputs)(**{**vars(inputs), "references": str(tmp_path / "references.npz")})
    jobs = [EvaluationJob("none", "stranger", "legal"), *bench.jobs("none", classes="b")]
    ended, passed = [], []
    failure, result = run_jobs(
        jobs, inputs, pool, on_result=lambda r: ended.append(r["job_id"]), on_milestone=lambda *a: passed.append(a)
    )
    names = {"job_id": jobs[0].job_id, "class": "stranger", "role": "legal", "defence": "none"}
    names |= {"draw": 0, "mask_seed": None, "seed": 0}
    held_out = {"failed": True, "stage": "adapt", "reason": "no pictures to compute a loss on", "attempts": 1}
    trained = {**held_out, "reason": "no pictures to fine-tune on"}
    assert failure in ({**names, **held_out}, {**names, **trained})
    assert len(result["distances"]) == NUM_IMAGES
    assert sorted(ended) == sorted(job.job_id for job in jobs)
    assert [(step, list(losses)) for step, losses, _ in passed] == [(4, [result["job_id"]])]


def test_processes_have_their_own_threads_and_devices(pool, measured) -> None:
    status = pool.status()
    workers = status["generators"]["workers"] + status["scorers"]["workers"]
    assert len({status["pid"], *(worker["pid"] for worker in workers)}) == 3
    assert all(worker["threads"] == 1 and worker["devices"] == "" for worker in workers)


@pytest.fixture
def group(ray_cluster) -> Iterator[PlacementGroup]:
    """A bundle of half a CPU. An adaptation asks for a whole one, so Ray would refuse to place it inside."""
    made = placement_group([{"CPU": 0.5}])
    ray.get(made.ready())
    yield made
    remove_placement_group(made)


def pids(pool: EvaluationPool) -> list[int]:
    return [worker["pid"] for kind in ("generators", "scorers") for worker in pool.status()[kind]["workers"]]


def test_a_trial_s_placement_group_captures_neither_tasks_nor_actors(bench, group, measured, tmp_path) -> None:
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    with EvaluationPool.start(bench.config()) as pool:
        trial = ray.remote(num_cpus=0, scheduling_strategy=inside)(Trial).remote(pool)
        inputs = bench.inputs(bench.config(), tmp_path)
        (result,) = ray.get(trial.run.remote(bench.jobs("none", classes="a"), inputs))
        assert result["distances"] == measured[0][0]["distances"]
        started = pids(pool)
        remove_placement_group(group)
        run_jobs(bench.jobs("base", classes="b"), inputs, pool)
        assert pids(pool) == started
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in started))


def test_a_trial_that_is_stopped_takes_its_adaptations_with_it(bench, pool, tmp_path) -> None:
    trial = ray.remote(num_cpus=0)(Trial).remote(pool)
    inputs = bench.inputs(bench.config("adapt.max_train_steps=100000"), tmp_path)
    trial.run.remote(bench.jobs("none", classes="ab"), inputs)
    running = wait_for(adaptations)
    ray.kill(trial)
    wait_for(lambda: not any(process.is_running() for process in running) and not adaptations())


def test_an_exception_from_a_callback_ends_what_was_started(bench, pool, tmp_path) -> None:
    class Pruned(Exception):
        pass

    def stop(*_: object) -> None:
        raise Pruned

    config = bench.config("adapt.max_train_steps=100000")
    with pytest.raises(Pruned):
        run_jobs(bench.jobs("none", classes="ab"), bench.inputs(config, tmp_path, (2,)), pool, on_milestone=stop)
    wait_for(lambda: not adaptations())


def test_jobs_that_are_not_worth_more_have_cost_no_more_and_can_go_on(bench, pool, measured, tmp_path) -> None:
    class Pruned(Exception):
        pass

    def prune(step: int, *_: object) -> None:
        if step == MILESTONES[1]:
            raise Pruned

    jobs, inputs = bench.jobs("none", classes="ac"), bench.inputs(bench.config(), tmp_path, MILESTONES)
    before, store = done(pool), Store(tmp_path)
    with pytest.raises(Pruned):
        run_jobs(jobs, inputs, pool, on_milestone=prune)
    wait_for(lambda: not adaptations())
    keys = [folder.name for folder in tmp_path.iterdir()]
    assert len(keys) == 2 and done(pool) == before
    assert [store.adapted(key) for key in keys] == [None, None]
    assert [store.paused(key)["step"] for key in keys] == [MILESTONES[1]] * 2
    straight = {result["job_id"]: result for result in measured[0]}
    for result in run_jobs(jobs, inputs, pool, on_milestone=lambda *_: None):
        assert result["losses"] == straight[result["job_id"]]["losses"]
        assert result["distances"] == straight[result["job_id"]]["distances"]
    assert [store.paused(key) for key in keys] == [None, None]


def test_a_caller_that_stops_does_not_disturb_another(bench, pool, tmp_path) -> None:
    config = bench.config("generation.num_inference_steps=100")
    mine, theirs = (bench.inputs(config, tmp_path / name) for name in ("mine", "theirs"))
    run_jobs(bench.jobs("base", classes="a"), mine, pool)
    drawn, (scorer,), running = done(pool)[0], pool.status()["scorers"]["workers"], []

    # What is in the store ends at once, when c is not yet drawn.
    def stop(_result: dict[str, object]) -> None:
        running.append(ray.remote(num_cpus=0)(Trial).remote(pool).run.remote(bench.jobs("base", classes="bd"), theirs))
        # The generator has gone on from the items of c to those of the other caller.
        wait_for(lambda: done(pool)[0] > drawn + 3)
        raise KeyboardInterrupt

    # Without a scorer c cannot end.
    os.kill(scorer["pid"], signal.SIGSTOP)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs([*bench.jobs("base", classes="c"), *bench.jobs("base", classes="a")], mine, pool, on_result=stop)
    finally:
        os.kill(scorer["pid"], signal.SIGCONT)
    results = ray.get(running[0])
    assert assert_each_picture_scored_once(results, tmp_path / "theirs") == 6
    for result in results:
        score = json.loads(
            (Store(tmp_path / "theirs").folder(result["store"]) / "score-style_enlite0.json").read_text()
        )
        assert [(item["generate_attempts"], item["score_attempts"]) for item in score["items"]] == [(1, 1)] * 3


def test_a_stopped_adaptation_is_ended_and_repeated(bench, pool, tmp_path) -> None:
    steps, stopped = 600, []

    def freeze(*_: object) -> None:
        stopped.extend(adaptations())
        for process in stopped:
            os.kill(process.pid, signal.SIGSTOP)

    config = bench.config(f"adapt.max_train_steps={steps}", "evaluation.item_timeout_s=30")
    jobs = bench.jobs("none", classes="a")
    (result,) = run_jobs(jobs, bench.inputs(config, tmp_path, (0,)), pool, on_milestone=freeze)
    assert len(stopped) == 1 and len(result["losses"]) == steps
    wait_for(lambda: not stopped[0].is_running())


def test_a_stopped_adaptation_is_reported_after_its_last_attempt(bench, pool, tmp_path) -> None:
    def freeze(*_: object) -> None:
        for process in adaptations():
            os.kill(process.pid, signal.SIGSTOP)

    overrides = ("adapt.max_train_steps=100000", "evaluation.item_timeout_s=10", "evaluation.max_attempts=1")
    jobs = bench.jobs("none", classes="a")
    (failure,) = run_jobs(jobs, bench.inputs(bench.config(*overrides), tmp_path, (0,)), pool, on_milestone=freeze)
    assert (failure["stage"], failure["attempts"]) == ("adapt", 1)
    assert failure["reason"] == "the adaptation gave no sign of life for 10 s"
    wait_for(lambda: not adaptations())


def test_record_of_an_adaptation_is_not_read_again(bench, pool, measured, tmp_path) -> None:
    # As from shared storage that shows a new file late.
    thread = threading.Thread(target=lambda: wait_for(lambda: [*tmp_path.glob("*/adapted.json")])[0].unlink())
    thread.start()
    config = bench.config("generation.num_inference_steps=100")
    (result,) = run_jobs(bench.jobs("none", classes="a"), bench.inputs(config, tmp_path), pool)
    thread.join()
    assert not list(tmp_path.glob("*/adapted.json"))
    expected = measured[0][0]
    for name in ("losses", "trainable_params", "optimizer_bytes", "audit_ok"):
        assert result[name] == expected[name]


def test_a_dead_coordinator_fails_its_jobs_and_not_the_run(bench, ray_cluster, tmp_path) -> None:
    with EvaluationPool.start(bench.config()) as pool:
        inputs = bench.inputs(bench.config(), tmp_path, (0,))
        jobs = bench.jobs("base", classes="ac")
        failures = run_jobs(jobs, inputs, pool, on_milestone=lambda *_: pool.stop())
    assert [(failure["job_id"], failure["stage"]) for failure in failures] == [(job.job_id, "score") for job in jobs]
    assert all("\n" not in failure["reason"] for failure in failures)


def test_loss_of_the_release_is_kept_and_a_mistake_is_one_line(bench, ray_cluster, tmp_path) -> None:
    config = bench.config("domain.general=[c]", "domain.legal=[d]")
    cache = bench.inputs(config, tmp_path).cache
    loss = base_loss(config, cache, str(tmp_path))
    (record,) = tmp_path.glob("*/base-loss.json")
    assert json.loads(record.read_text()) == {"loss": loss} and loss > 0
    shutil.copytree(bench.root / "sd", tmp_path / "sd")
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    broken = bench.config(
        "domain.general=[c]", "domain.legal=[d]", f"model.pretrained_model_name_or_path={tmp_path / 'sd'}"
    )
    with pytest.raises(RaygardError, match="the release's own loss on general classes: ") as caught:
        base_loss(broken, cache, str(tmp_path))
    assert "\n" not in str(caught.value) and "Error" not in str(caught.value)


@pytest.mark.parametrize("milestones", [(5,), (-1,), (2, 1), (1, 1)])
def test_milestones_beyond_the_adaptation_are_refused(bench, pool, tmp_path, milestones) -> None:
    with pytest.raises(RaygardError, match="milestones must be ascending and within 0 and 4"):
        run_jobs(bench.jobs("none"), bench.inputs(bench.config(), tmp_path, milestones), pool)


def test_actors_for_another_model_are_refused(bench, pool, tmp_path) -> None:
    config = bench.config("model.pretrained_model_name_or_path=zoo:tiny-sd")
    with pytest.raises(RaygardError, match="these evaluation actors hold model"):
        run_jobs(bench.jobs("none"), bench.inputs(config, tmp_path), pool)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.generator_gpus=1", "one evaluation process needs 1 GPU, but the largest node has 0"),
        ("evaluation.cpus_per_job=64", "one evaluation process needs 64 CPU"),
        (
            "evaluation.scorer_cpus=1.5",
            r"1 generators x 0 \+ 1 scorers x 1.5 \+ one adaptation x 1 = 2.5 CPU, but the cluster has 2",
        ),
    ],
)
def test_what_the_cluster_can_never_hold_is_refused_at_once(bench, ray_cluster, override, message) -> None:
    with pytest.raises(RaygardError, match=message):
        EvaluationPool.start(bench.config(override))


def test_result_file_leads_the_report_to_the_pictures(measured, tmp_path) -> None:
    results, store, _ = measured
    save_result(tmp_path, store, results[0])
    file = tmp_path / "evaluation" / "jobs" / results[0]["job_id"] / "result.json"
    written = file.stat().st_mtime_ns
    save_result(tmp_path, store, results[0])
    assert file.stat().st_mtime_ns == written
    pictures = RunFiles(tmp_path).pictures(results[0]["job_id"])
    assert np.array_equal(pictures, read_pictures(Store(store).pictures_file(results[0]["store"])))
    assert not Path(json.loads(file.read_text())["pictures"]).is_absolute()
