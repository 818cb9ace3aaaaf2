"""What the tour (`docs.make_tour`) carries from stop to stop."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data import Problem
from model import Completion, Qwen3, load_model, token_logprobs
from model.sampler import random_streams
from rl.batch import Batch, Sample, completion_logprobs, make_batch
from rl.grpo import group_samples
from rl.learner import Learner
from rl.loss import clip_counts, grpo_loss
from rl.optimizer import Optimizer, joint_norm
from lab.recipe import GRPOStage, Recipe
from lab.recipe import load_recipe
from rl.rollout import Actor, Rollout, collect_rollouts, paid

# Chosen so that completions are short, some right and some not, and no random number is near another token's.
PROBLEM, SEED, SAMPLES, MAX_NEW_TOKENS = Problem((5, 16, 11), 32), 2, 6, 64
FOLLOWED = 1  # the completion that is shown token by token


@dataclass(frozen=True)
class Walk:
    """What the stops look at. The learner's model and gradient change on the way, nothing else does."""

    actor: Actor
    learner: Learner
    untrained: Qwen3
    group: list[Rollout]
    samples: list[Sample]
    batch: Batch

    @property
    def stage(self) -> GRPOStage:
        return self.learner.recipe.stages[0]

    @property
    def prompt(self) -> list[int]:
        return self.group[0].prompt_ids

    @property
    def uniforms(self) -> Tensor:
        """The random number of each token, [completion, t]."""
        return random_streams([self.prompt], SAMPLES, MAX_NEW_TOKENS, SEED)[0]

    def token(self, token_id: int) -> str:
        return repr(self.actor.tokenizer.decode([token_id]))

    def ratio(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities by the model as it is now, and their ratio to the sampler's; both [completion, t]."""
        with torch.no_grad():
            logprobs = completion_logprobs(self.learner.model, self.batch)
        return logprobs, (logprobs - self.batch.old_logprobs).exp()

    def clipped(self) -> tuple[int, int]:
        batch, stage = self.batch, self.stage
        return clip_counts(self.ratio()[0], batch.old_logprobs, batch.advantages, batch.mask, stage.clip_low, stage.clip_high)

    def pushes(self) -> Tensor:
        """Minus the loss's gradient at each log-probability, [completion, t]."""
        batch, logprobs = self.batch, self.ratio()[0].requires_grad_()
        clip = (self.stage.clip_low, self.stage.clip_high)
        loss = grpo_loss(logprobs, batch.old_logprobs, batch.advantages, batch.mask, *clip, aggregation=self.stage.aggregation)
        return -torch.autograd.grad(loss, logprobs)[0]

    def gradient_norm(self, part: str = "") -> float:
        """Of the parameters with `part` in their names."""
        parameters = self.learner.optimizer.parameters
        return joint_norm([p.grad for name, p in parameters.items() if part in name and p.grad is not None])


def begin() -> Walk:
    _, recipe = load_recipe("256-tiny")
    recipe = replace(recipe, sampling=replace(recipe.sampling, max_new_tokens=MAX_NEW_TOKENS))
    (model, tokenizer), (untrained, _) = load_model("tiny"), load_model("tiny")
    actor = Actor(model, tokenizer, recipe.task, recipe.sampling)
    learner = Learner(model, Optimizer(model), recipe, recipe.optimizer.micro_batch_tokens)
    group = sample_group(actor, recipe)
    samples = group_samples([group], recipe.stages[0].scale_by_std)[0]
    return Walk(actor, learner, untrained, group, samples, make_batch(samples))


def sample_group(actor: Actor, recipe: Recipe) -> list[Rollout]:
    return paid(collect_rollouts(actor, [PROBLEM], SAMPLES, SEED), recipe.reward)[0]


def distributions(model: Qwen3, prompt: list[int], completion: Completion) -> Tensor:
    """The probabilities from which each token of a completion was drawn, [t, id]."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids[:-1]]))[0, len(prompt) - 1 :]
    return token_logprobs(logits, 1.0, model.num_tokens).exp()
