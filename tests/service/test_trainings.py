"""Trainings over HTTP: what is accepted, what is refused and why, and what a caller sees of one."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.service.conftest import Bench, Open
from tests.service.test_following import Told, read
from tests.waiting import wait_for
from workers import queues
from workers.jobs import CUSTOMIZE, TRAINING, JobError, TrainingProgress, TrainingResult
from workers.registry import MAIN, Registry
from workers.training.recipes import Recipe, load_recipe


def submit(bench: Bench, **body: Any) -> dict[str, Any]:
    answer = bench.client.post("/v1/trainings", json={"recipe": "sticker-adapter", **body})
    assert answer.status_code == 202, answer.text
    return answer.json()


def refusal(bench: Bench, **body: Any) -> list[tuple[str, str]]:
    """(pointer, code) of each fault."""
    answer = bench.client.post("/v1/trainings", json={"recipe": "sticker-adapter", **body})
    assert answer.status_code == 422, answer.text
    assert queues.queue(bench.redis, TRAINING).count == 0, "nothing is queued"
    return [(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]]


def test_a_training_is_accepted_with_its_whole_recipe(bench: Bench) -> None:
    """The worker needs nothing but the record: the recipe in it is the named one with the overrides applied."""
    overrides = {"seed": 5, "lora": {"rank": 4}, "stages": {"warm-up": {"steps": 7, "optimizer": {"lr": 1e-4}}}}
    body = submit(bench, adapter="toy-v2", overrides=overrides, metadata={"team": "toys"})
    assert body["status"] == "queued" and body["queue"] == {"position": 0, "eta_s": None}
    record = bench.trainings.get(body["id"])
    assert record is not None
    recipe, plain = Recipe.model_validate(record.job.recipe), load_recipe("sticker-adapter")
    assert (recipe.seed, recipe.lora.rank, recipe.lora.targets) == (5, 4, plain.lora.targets)
    assert (recipe.stages[0].steps, recipe.stages[0].optimizer.lr) == (7, 1e-4)
    assert recipe.stages[0].optimizer.betas == plain.stages[0].optimizer.betas
    assert recipe.stages[1:] == plain.stages[1:]
    assert record.job.adapter == "toy-v2" and body["request"]["adapter"] == "toy-v2"
    assert body["metadata"] == {"team": "toys"}
    assert "model" not in body["request"]["recipe"] and "data" not in body["request"]["recipe"]
    assert queues.queue(bench.redis, TRAINING).get_job_ids() == [body["id"]]
    assert queues.queue(bench.redis, CUSTOMIZE).count == 0, "no inference worker is bothered"


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ({"recipe": "nowhere"}, [("/recipe", "recipe_unknown")]),
        ({"recipe": "../../etc/passwd"}, [("/recipe", "recipe_unknown")]),
        ({"recipe": "tiny"}, [("/recipe", "recipe_unusable")]),
        ({"recipe": "dreamo-flux-dev"}, [("/dataset", "dataset_missing")]),
        ({"recipe": "dreamo-flux-dev", "dataset": "none-such"}, [("/dataset", "dataset_unknown")]),
        ({"recipe": "dreamo-flux-dev", "dataset": "../x"}, [("/dataset", "dataset_unknown")]),
        ({"dataset": "toys"}, [("/dataset", "invalid_value")]),
        ({"adapter": "../x"}, [("/adapter", "invalid_value")]),
        ({"overrides": {"model": {"base": "/etc"}}}, [("/overrides/model", "override_invalid")]),
        ({"overrides": {"data": {"path": "/etc"}}}, [("/overrides/data", "override_invalid")]),
        ({"overrides": {"lora": {"rank": 0}}}, [("/overrides/lora/rank", "override_invalid")]),
        ({"overrides": {"stages": {"nope": {}}}}, [("/overrides/stages/nope", "override_invalid")]),
        (
            {"overrides": {"stages": {"warm-up": {"steps": "x"}}}},
            [("/overrides/stages/warm-up/steps", "override_invalid")],
        ),
        ({"overrides": {"stages": {"warm-up": {"train": "base"}}}}, [("/recipe", "recipe_unusable")]),
        ({"overrides": {"stages": 5}}, [("/overrides/stages", "override_invalid")]),
        ({"overrides": 5}, [("/overrides", "invalid_type")]),
        ({"overrides": {"lora": {"rank": 10**12}}}, [("/overrides/lora/rank", "override_invalid")]),
        (
            {"overrides": {"stages": {"warm-up": {"batch": 10**18, "steps": 10**18}}}},
            [(f"/overrides/stages/warm-up/{name}", "override_invalid") for name in ("steps", "batch")],
        ),
        (
            {"overrides": {"stages": {"warm-up": {"settings": {"size": 10**6, "reference_size": 10**5}}}}},
            [("/overrides/stages/warm-up/settings", "override_invalid")],
        ),
        (
            {"overrides": {"stages": {"warm-up": {"settings": {"size": 1024}, "batch": 1000}}}},
            [("/overrides/stages/warm-up/batch", "override_invalid")],
        ),
        (
            {"overrides": {"stages": {"warm-up": {"settings": {"bogus": 1}}}}},
            [("/overrides/stages/warm-up/settings/bogus", "override_invalid")],
        ),
        (
            {"overrides": {"stages": {"warm-up": {"settings": {"mixture": [["style_text", 1]]}}}}},
            [("/overrides/stages/warm-up/settings/mixture", "override_invalid")],
        ),
        (
            {"overrides": {"stages": {"warm-up": {"mixture": {"no_such": 1}}}}},
            [("/overrides/stages/warm-up/mixture/no_such", "override_invalid")],
        ),
        (
            {"overrides": {"stages": {"warm-up": {"mixture": {}}}}},
            [("/overrides/stages/warm-up/mixture", "override_invalid")],
        ),
        ({"unheard": 1}, [("/unheard", "unknown_field")]),
        ({"metadata": {"k": "x" * 5000}}, [("/metadata", "metadata_too_large")]),
        (
            {"overrides": {"lora": {"rank": 0}}, "adapter": "A"},
            [("/overrides/lora/rank", "override_invalid"), ("/adapter", "invalid_value")],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(
    bench: Bench, body: dict[str, Any], faults: list[tuple[str, str]]
) -> None:
    """Every fault at once, each with a pointer; a caller can name neither a path nor another base model, nor have a
    worker make more records at once than its memory holds: every worker would take it up and be lost."""
    (bench.home / "datasets" / "toys").mkdir(parents=True)
    assert refusal(bench, **body) == faults


def test_a_dataset_of_the_server_can_be_named(bench: Bench) -> None:
    """A recipe for real data takes any of the operator's datasets."""
    (bench.home / "datasets" / "toys").mkdir(parents=True)
    body = submit(bench, recipe="dreamo-flux-dev", dataset="toys")
    assert body["request"]["dataset"] == "toys"
    offers = bench.client.get("/v1/recipes").json()
    assert offers["datasets"] == ["toys"]
    assert {"sticker-adapter", "dreamo-flux-dev"} <= {recipe["name"] for recipe in offers["recipes"]}
    assert "tiny" not in {recipe["name"] for recipe in offers["recipes"]}, "it trains a base"


def test_recipes_of_the_operator_go_beside_the_shipped(bench: Bench) -> None:
    """A file in DREAMSERVE_RECIPES_DIR is a recipe; one that is broken is not offered, and harms nobody."""
    recipes = bench.home / "recipes"
    recipes.mkdir()
    (recipes / "mine.yaml").write_text(
        "name: mine\nstages: [{name: one, steps: 1, batch: 1, mixture: {single_subject: 1}}]"
    )
    (recipes / "broken.yaml").write_text("name: [")
    (recipes / "lost.yaml").write_text("name: lost\nstages: [{name: one, steps: 1, batch: 1, mixture: {no_such: 1}}]")
    assert submit(bench, recipe="mine")["request"]["recipe"]["name"] == "mine"
    for name in ("broken", "lost"):
        assert refusal_after(bench, recipe=name) == [("/recipe", "recipe_unusable")]
    names = {recipe["name"] for recipe in bench.client.get("/v1/recipes").json()["recipes"]}
    assert "mine" in names and not {"broken", "lost"} & names


def refusal_after(bench: Bench, **body: Any) -> list[tuple[str, str]]:
    answer = bench.client.post("/v1/trainings", json=body)
    return [(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]]


def test_a_training_is_followed_to_its_adapter(bench: Bench, tmp_path: Path) -> None:
    """Progress with losses and time left, then the result, which is listed among the adapters."""
    job = submit(bench)["id"]
    url = f"/v1/trainings/{job}"
    token = bench.trainings.claim(job, "w")
    assert token is not None
    assert bench.trainings.beat(job, token, TrainingProgress("warm-up", 40, 420, {"flow": 0.5}, 16.0, 0.5)) == "ok"
    body = bench.client.get(url).json()
    assert body["status"] == "running"
    assert body["progress"] == {
        "stage": "warm-up",
        "step": 40,
        "total": 420,
        "losses": {"flow": 0.5},
        "samples_per_second": 16.0,
        "seconds_left": 190.0,
    }
    source = tmp_path / "exported"
    source.mkdir()
    (source / MAIN).write_bytes(b"weights")
    (source / "adapter.json").write_text(
        '{"recipe": {"name": "sticker-adapter", "model": {"base": "/secret"}}, "steps": 420}'
    )
    adapter = Registry(bench.home / "adapters").publish("sticker-adapter", source)
    assert bench.trainings.commit(job, token, TrainingResult(adapter.name, adapter.version, 420, {"flow": 0.25}))
    body = bench.client.get(url).json()
    assert body["status"] == "succeeded" and body["expires_at"] is not None
    assert body["result"] == {
        "adapter": "sticker-adapter",
        "version": adapter.version,
        "steps": 420,
        "losses": {"flow": 0.25},
    }
    answer = bench.client.get("/v1/adapters")
    (listed,) = answer.json()["adapters"]
    assert (listed["name"], listed["version"], listed["steps"]) == ("sticker-adapter", adapter.version, 420)
    assert "/secret" not in answer.text and str(bench.home) not in answer.text
    assert bench.client.get("/v1/adapters?name=other").json() == {"adapters": []}
    assert bench.client.get("/v1/adapters?name=..%2Fx").status_code == 422


def test_cancel(bench: Bench) -> None:
    """Queued: at once. Running: asked, and the worker hears of it. Unknown: 404."""
    queued, running = submit(bench)["id"], submit(bench)["id"]
    answer = bench.client.post(f"/v1/trainings/{queued}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
    token = bench.trainings.claim(running, "w")
    assert token is not None
    answer = bench.client.post(f"/v1/trainings/{running}/cancel")
    assert (answer.status_code, answer.json()["cancel_requested"]) == (202, True)
    assert bench.trainings.beat(running, token) == "canceled"
    assert bench.client.post("/v1/trainings/train_none/cancel").status_code == 404
    assert bench.client.get("/v1/trainings/train_none").status_code == 404


def test_trainings_and_jobs_are_listed_apart(bench: Bench) -> None:
    """A customize job is no training and the other way round, in lists and by id."""
    job, training = bench.submit()["id"], submit(bench)["id"]
    assert [body["id"] for body in bench.client.get("/v1/trainings").json()["trainings"]] == [training]
    assert [body["id"] for body in bench.client.get("/v1/jobs").json()["jobs"]] == [job]
    assert bench.client.get(f"/v1/jobs/{training}").status_code == 404
    assert bench.client.get(f"/v1/trainings/{job}").status_code == 404
    assert bench.client.get("/v1/trainings?cursor=x").status_code == 422


def step(number: int) -> TrainingProgress:
    return TrainingProgress("warm-up", number, 420, {"flow": 0.5}, 16.0, 0.5)


def test_a_training_is_followed_by_its_events(bench: Bench) -> None:
    """States and steps in order, up to the end; from the last known one on; then there is nothing more."""
    body = submit(bench)
    token = bench.trainings.claim(body["id"], "w")
    assert token is not None
    for number in (1, 2):
        bench.trainings.beat(body["id"], token, step(number))
    bench.trainings.fail(body["id"], token, JobError("training_failed", "It broke."))
    url = body["urls"]["events"]
    told = list(read(iter(bench.client.get(url).text.split("\n"))))
    assert [event.id for event in told] == ["1", "2", "3", "4", "5"]
    assert [event.data["status"] for event in told if event.kind == "status"] == ["queued", "running", "failed"]
    assert [event.data for event in told if event.kind == "progress"] == [asdict(step(number)) for number in (1, 2)]
    rest = bench.client.get(url, headers={"Last-Event-ID": "3"}).text
    assert list(read(iter(rest.split("\n")))) == told[3:]
    assert bench.client.get(url, headers={"Last-Event-ID": "5"}).status_code == 204
    gap = next(read(iter(bench.client.get(url, headers={"Last-Event-ID": "99"}).text.split("\n"))))
    assert gap.kind == "reset" and gap.data["id"] == body["id"] and gap.data["status"] == "failed"


def test_events_of_trainings_and_jobs_are_apart(bench: Bench) -> None:
    """The id of one is unknown to the other."""
    job, training = bench.submit()["id"], submit(bench)["id"]
    assert bench.client.get(f"/v1/trainings/{job}/events").status_code == 404
    assert bench.client.get(f"/v1/jobs/{training}/events").status_code == 404


def test_a_gateway_that_leaves_lets_its_followers_go(open_gate: Open, bench: Bench) -> None:
    """Who follows a training for hours comes back to the next gateway, and goes on there."""
    gate, training = open_gate(), submit(bench)
    told: list[Told] = []

    def follow(after: str) -> None:
        url, headers = gate.url + training["urls"]["events"], {"Last-Event-ID": after}
        with httpx2.stream("GET", url, headers=headers, timeout=240) as answer:
            for event in read(answer.iter_lines()):
                told.append(event)

    gateway = gate.app.state.gateway
    caller = threading.Thread(target=follow, args=("0",))
    caller.start()
    wait_for(lambda: told, "the follower's first event")
    gateway.let_go()
    caller.join(60)
    assert not caller.is_alive() and [event.data["status"] for event in told] == ["queued"]
    bench.trainings.cancel(training["id"])
    gate = open_gate()
    follow(told[-1].id)
    assert [event.data["status"] for event in told] == ["queued", "canceled"]
