"""One problem followed through the whole system, with real numbers: the generator of docs/tour.md.

`python -m docs.make_tour` prints the page, `python -m docs.make_tour --out docs/tour.md` writes it. Each
function `..._stop` is a section: a heading, a few sentences, and results of the functions that they name.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import fill

import torch
import tyro
from torch import Tensor

from data.countdown import Countdown, Problem
from data.task import split_answer
from lab.recipe import Recipe, load_recipe
from model import Completion, Qwen3, Tokenizer, generate, load_model, prompt_ids, token_logprobs
from model.cache import GroupCache
from model.memory import token_bytes
from model.sampler import DecodeBatch, TokenChoice, prefill, random_uniforms, sample_completion, sample_tokens
from rl.advantage import group_advantages
from rl.batch import Batch, Sample, completion_logprobs, logprobs_and_entropy, make_batch
from rl.grpo import GRPOStage, grpo_step, grpo_update, with_advantages
from rl.loss import clip_counts, grpo_loss, loss_denominator
from rl.optimizer import MAX_GRAD_NORM, Optimizer, joint_norm
from rl.reward import reward_for
from rl.rollout import Rollout, collect_rollouts
from rl.trainer import Trainer

# Chosen so that completions are short, some right and some wrong, and no u is near the edge of an interval.
PROBLEM = Problem((3, 9, 14), 42)
SEED = 1
SAMPLES = 6
MAX_NEW_TOKENS = 64
FOLLOWED = 2  # the completion that is shown token by token

OPENING = f"""What happens between a question and a better model, once, with real numbers and the function
that does each part. The model is `tiny-256`, the embedded one after `make train-256`. The step is
like that run's, but with one problem, {SAMPLES} completions of at most {MAX_NEW_TOKENS} tokens, no warm-up.
`python -m docs.make_tour` ([make_tour.py](make_tour.py)) prints this page, and a test compares the two.
Completions are numbered from 0, and t counts the tokens of a completion, from 0."""
CLOSING = """[From REINFORCE to GRPO](algorithm.md) says why each formula is what it is; the
[exercises](exercises.md) are changes to make and to predict. In the code, read `grpo_step` in
[grpo.py](../rl/grpo.py), then [rollout.py](../rl/rollout.py), `sample_completion` in
[sampler.py](../model/sampler.py), [qwen3.py](../model/qwen3.py), [batch.py](../rl/batch.py) and
[loss.py](../rl/loss.py). Outside the core, [stages.py](../lab/stages.py) repeats the step until a stage is
done."""


@dataclass
class Walk:
    """What the stops share. `model` and `optimizer` are trained on the way; `untrained` stays as it was."""

    recipe: Recipe
    tokenizer: Tokenizer
    untrained: Qwen3
    model: Qwen3
    optimizer: Optimizer
    group: list[Rollout]
    samples: list[Sample]
    batch: Batch
    after_one_step: dict[str, Tensor] = field(default_factory=dict)  # the weights then

    @property
    def stage(self) -> GRPOStage:
        return self.recipe.stages[0]

    @property
    def prompt(self) -> list[int]:
        return self.group[0].prompt_ids

    @property
    def uniforms(self) -> Tensor:
        """The random number of each token, [completion, t]."""
        return random_uniforms([self.prompt], SAMPLES, MAX_NEW_TOKENS, SEED)[0]

    @property
    def clipping(self) -> tuple:
        """Arguments that `grpo_loss` and `clip_counts` take after the log-probabilities."""
        batch, stage = self.batch, self.stage
        return batch.old_logprobs, batch.advantages, batch.mask, stage.clip_low, stage.clip_high

    def token(self, token_id: int) -> str:
        return repr(self.tokenizer.decode([token_id]))

    def logprobs(self) -> Tensor:
        """Of the completions' tokens by the model as it is now, [completion, t]."""
        with torch.no_grad():
            return completion_logprobs(self.model, self.batch)

    def pushes(self) -> Tensor:
        """Minus the gradient of the loss at each log-probability, [completion, t]."""
        logprobs = self.logprobs().requires_grad_()
        loss = grpo_loss(logprobs, *self.clipping, aggregation=self.stage.aggregation)
        return -torch.autograd.grad(loss, logprobs)[0]

    def add_gradient(self, samples: list[Sample]) -> float:
        """Add the part of the group's gradient that comes from `samples`; return their part of the loss."""
        lengths = [len(sample.completion_ids) for sample in self.samples]
        denominator = loss_denominator(lengths, MAX_NEW_TOKENS, self.stage.aggregation)

        def add_gradient(batch: Batch) -> Counter:
            loss = grpo_loss(
                completion_logprobs(self.model, batch),
                batch.old_logprobs,
                batch.advantages,
                batch.mask,
                clip_low=self.stage.clip_low,
                clip_high=self.stage.clip_high,
                aggregation=self.stage.aggregation,
                denominator=denominator,
            )
            loss.backward()
            return Counter(loss=loss.item())

        return Trainer(self.model, self.optimizer).sum_over_micro_batches(samples, add_gradient)["loss"]

    def gradient_norm(self, part: str = "") -> float:
        """Of the parameters with `part` in their names."""
        parameters = self.optimizer.parameters.items()
        return joint_norm(p.grad for name, p in parameters if part in name and p.grad is not None)


def begin() -> Walk:
    """Sample the group that is followed, and make its batch."""
    _, recipe = load_recipe("256-tiny")
    recipe = replace(recipe, sampling=replace(recipe.sampling, max_new_tokens=MAX_NEW_TOKENS))
    model, tokenizer = load_model("tiny-256")
    group = sample_group(model, tokenizer, recipe)
    advantages = group_advantages(rewards_of(group), scale_by_std=recipe.stages[0].scale_by_std)
    (samples,) = with_advantages([group], advantages)
    untrained = load_model("tiny-256")[0]
    optimizer = Optimizer(model, recipe.optimizer)
    return Walk(recipe, tokenizer, untrained, model, optimizer, group, samples, make_batch(samples))


def sample_group(model: Qwen3, tokenizer: Tokenizer, recipe: Recipe) -> list[Rollout]:
    options = {"sampling": recipe.sampling, "num_samples": SAMPLES, "seed": SEED, "reward": recipe.reward}
    return collect_rollouts(model, tokenizer, recipe.task, [PROBLEM], **options)[0]


def rewards_of(group: list[Rollout]) -> Tensor:
    return torch.tensor([[rollout.reward for rollout in group]])  # [1, samples]


def distributions(model: Qwen3, prompt: list[int], completion: Completion) -> Tensor:
    """The probabilities from which each token of a completion was sampled, [t, id]."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids[:-1]]))[0, len(prompt) - 1 :]
    return token_logprobs(logits, 1.0, model.num_tokens).exp()


# The stops


def prompt_stop(walk: Walk) -> list[str]:
    """The prompt"""
    question = walk.recipe.task.prompt(PROBLEM)
    return [
        f"""The problem is `{PROBLEM}`: reach {PROBLEM.target} with each number exactly once. The task
        ({at(Countdown.prompt)}) puts it into words, and {at(prompt_ids)} puts these into the chat format of
        the model, which its own chat template gives. It also opens `<think>` for the model, so that what the
        model writes begins with its work.""",
        code(walk.tokenizer.decode(prompt_ids(walk.tokenizer, question, thinking=True)).strip()),
    ]


def ids_stop(walk: Walk) -> list[str]:
    """Ids"""
    words = [f"{token_id} {walk.token(token_id)}" for token_id in walk.prompt]
    words = [word if len(word) < 60 else f"{word[:30]}...'" for word in words]
    return [
        f"""The model reads ids, not text ({at(Tokenizer.encode)}). The embedded model's tokenizer has
        {len(walk.tokenizer)}: one for each fixed phrase of the prompt and each number up to 100, and one
        for each byte. So the prompt is {len(words)} ids.""",
        code(lines(words)),
    ]


def prefill_stop(walk: Walk) -> list[str]:
    """Prefill: the prompt once for the whole group"""
    model, length, size = walk.untrained, len(walk.prompt), token_bytes(walk.untrained)
    with torch.no_grad():
        logits, cache, _ = prefill(model, [walk.prompt])
    likeliest = token_logprobs(logits[0], 1.0, model.num_tokens).exp().topk(3)
    first, _ = sample_tokens(logits.expand(SAMPLES, -1), walk.uniforms[:, 0], model.num_tokens, TokenChoice())
    choices = [f"`{walk.token(int(n))}` ({show(p)})" for p, n in zip(*likeliest, strict=True)]
    return [
        f"""One forward over the {length} ids ({at(prefill)}, {at(Qwen3.forward)}) gives the logits of the
        next token. It leaves in the cache what later tokens attend to: a key and a value for each token of
        the prompt, in each layer and key-value head. All {SAMPLES} completions read the same copy
        ({at(GroupCache)}).""",
        code(
            f"keys of one layer    {list(cache.keys[0].shape)}: prompts, key-value heads, tokens, head_dim\n"
            f"one token            {size:,} bytes: keys and values of {len(cache.keys)} layers, "
            "4 bytes a number\n"
            f"prompt, stored once  {length} tokens, {size * length:,} bytes\n"
            f"{SAMPLES} copies would be    {SAMPLES * length} tokens, {size * SAMPLES * length:,} bytes"
        ),
        f"""The softmax of the logits ({at(token_logprobs)}) is the distribution of the first token. The
        likeliest of {model.num_tokens} ids are {", ".join(choices)}: the numbers of the problem.
        Before training it would have begun with musing, "I wonder whether it can be done" for instance. Each
        completion samples with its own random number ({at(sample_tokens)}):
        {", ".join(f"`{walk.token(token_id)}`" for token_id in first.tolist())}.""",
    ]


def sampling_stop(walk: Walk) -> list[str]:
    """Sampling, token by token"""
    completion, uniforms = walk.group[FOLLOWED].completion, walk.uniforms[FOLLOWED]
    stops = walk.tokenizer.stop_token_ids
    tokens = sample_completion(walk.untrained, walk.prompt, uniforms, stops, TokenChoice())
    plain = [token for token, _ in tokens]
    probabilities = distributions(walk.untrained, walk.prompt, completion)
    rows = [("t", "id", "token", "u", "from", "to", "probability", "logprob")]
    for t, (token_id, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        high, width = probabilities[t, : token_id + 1].sum(), probabilities[t, token_id]
        numbers = map(show, (uniforms[t], high - width, high, width, logprob))
        rows.append((str(t), str(token_id), walk.token(token_id), *numbers))
    return [
        f"""{at(generate)} continues all completions together, one token each per forward
        ({at(DecodeBatch)}), until the model writes `<|im_end|>` or the limit is reached, here
        {MAX_NEW_TOKENS} tokens. From now on we follow completion {FOLLOWED}. Imagine all ids side by side
        on the line from 0 to 1, each as wide as its probability: the random number u falls on one id, and
        that id is taken. The table has the interval of that id, and the log of its width. This last column
        is kept with the completion: the log-probability under the policy that sampled. The ratio is
        measured against it.""",
        table(rows),
        f"""The model is sure of its arithmetic, which it has learned, and of copying. It is unsure where
        there is a choice: which numbers and which operation (t = 0, 1 and 7). Only there can learning change
        much. {at(sample_completion)} is the same sampler in
        ten lines, for one completion. Does it find the same ids? {yes(plain == completion.token_ids)}.""",
    ]


def verdict_stop(walk: Walk) -> list[str]:
    """Verdict and reward"""
    _, answer = split_answer(walk.group[FOLLOWED].text, thinking=True)
    return [
        f"""{at(collect_rollouts)} decodes each completion, and the task judges the text
        ({at(Countdown.judge)}): after its thinking it must give one `<answer>` ({at(split_answer)}), and
        exact arithmetic checks that this uses each number once and reaches the target. In completion
        {FOLLOWED} it is `{answer}`. {at(reward_for)} applies the recipe's settings; this recipe gives near
        misses the reward of any wrong answer.""",
        group_table(walk.group),
        """Two are cut off, one of them within its answer. Two give up after one attempt that misses by one,
        and two find it.""",
    ]


def advantage_stop(walk: Walk) -> list[str]:
    """Advantage: better or worse than the group"""
    rewards = rewards_of(walk.group)
    mean, std = rewards.mean().item(), rewards.std(correction=0).item()
    plain = [f"{reward:g}" for reward in rewards[0].tolist()]
    squares = " + ".join(f"({reward} - {mean:.3f})^2" for reward in plain)
    advantage = f"(1 - {mean:.3f}) / {std + 1e-4:.4f} = {(1 - mean) / (std + 1e-4):.3f}"
    rows = [("completion", "reward", "advantage")]
    rows += [(str(n), plain[n], show(advantage)) for n, advantage in enumerate(group_advantages(rewards)[0])]
    return [
        f"""Is a reward of 0.1 good? That depends on what else can be earned. {at(group_advantages)}
        compares each reward with its group, which replaces the critic of other methods. By hand:""",
        code(
            f"mean = ({' + '.join(plain)}) / {SAMPLES} = {mean:.3f}\n"
            f"std  = sqrt(({squares}) / {SAMPLES}) = {std:.3f}\n"
            f"A    = (reward - mean) / (std + 0.0001) = {advantage} for completion {FOLLOWED}"
        ),
        table(rows),
        """They sum to zero. If all rewards were equal, each advantage would be zero, and the group would
        teach nothing.""",
    ]


def batch_stop(walk: Walk) -> list[str]:
    """The batch: shift and mask"""
    batch, longest = walk.batch, walk.batch.mask.shape[1]
    length = len(walk.samples[FOLLOWED].completion_ids)
    padded = len(walk.prompt) + longest - 1
    rows = [("t", "mask", "position", "input there", "target", "id", "old logprob")]
    for t in (0, 1, 2, length - 2, length - 1, length, longest - 1):
        position, target = int(batch.logit_positions[FOLLOWED, t]), int(batch.target_ids[FOLLOWED, t])
        words = ("", "", "")
        if mask := int(batch.mask[FOLLOWED, t]):
            words = (str(position), walk.token(int(batch.input_ids[0, position])), walk.token(target))
        rows.append((str(t), str(mask), *words, str(target), show(batch.old_logprobs[FOLLOWED, t])))
    return [
        f"""{at(make_batch)} is the one place that shifts and masks. All completions are in one stream, in
        which the prompt stands once: {batch.input_ids.shape[1]} tokens with padding, where rows padded
        to the longest would be {SAMPLES} x {padded} = {SAMPLES * padded}. A model predicts the *next* token,
        so the target at t, the completion's token there, is predicted one position earlier; for t = 0 that
        is the prompt's last id, which each completion has for itself. From row {FOLLOWED} of the tensors,
        whose shape is [{SAMPLES}, {longest}]:""",
        table(rows),
        f"""The mask is made from the length, {length}. The stop id is a target like any other, since
        stopping has to be learned; padding after it does not count.""",
    ]


def ratio_stop(walk: Walk) -> list[str]:
    """The trainer's log-probabilities, and the ratio"""
    with torch.no_grad():
        logprobs, entropy = logprobs_and_entropy(walk.model, walk.batch)
    old = walk.batch.old_logprobs
    columns = (old, logprobs, (logprobs - old).exp(), entropy)
    rows = [("t", "token", "sampler", "trainer", "ratio", "entropy")]
    for t, token_id in enumerate(walk.samples[FOLLOWED].completion_ids[:10]):
        rows.append((str(t), walk.token(token_id), *(show(column[FOLLOWED, t]) for column in columns)))
    return [
        f"""The sampler went token by token through a cache; the trainer takes the whole stream in one
        forward ({at(logprobs_and_entropy)}). Both turn logits into log-probabilities with the same function,
        {at(token_logprobs)}, and have to agree. Do all {int(walk.batch.mask.sum())} tokens, to 0.0001?
        {yes((logprobs - old).abs().max() < 1e-4)}. So the ratio, the exponential of trainer minus sampler,
        is one everywhere until the weights change. The entropy beside it, in nats, measures how open the
        choice was.""",
        table(rows),
    ]


def loss_stop(walk: Walk) -> list[str]:
    """The loss and its gradient"""
    tokens = int(walk.batch.mask.sum())
    rows = [("completion", "advantage", "tokens", "A x tokens", "push a token", "gradient norm alone")]
    total = 0.0
    for n, (one, push) in enumerate(zip(walk.samples, walk.pushes()[:, 0], strict=True)):
        walk.add_gradient([one])
        norm, count = show(walk.gradient_norm()), len(one.completion_ids)
        walk.optimizer.clear_gradients()
        rows.append(
            (str(n), show(one.advantage), str(count), f"{one.advantage * count:.2f}", f"{push:.4f}", norm)
        )
        total += one.advantage * count
    loss = walk.add_gradient(walk.samples)
    parts = ["embed_tokens", *(f"layers.{n}" for n in range(walk.model.config.num_hidden_layers))]
    norms = ", ".join(f"{part} {walk.gradient_norm(part):.3f}" for part in parts)
    return [
        f"""{at(grpo_loss)} is the mean over all tokens of -min(ratio x A, clip(ratio) x A). While every
        ratio is one, that is minus the sum of A x tokens, divided by all tokens: -({total:.2f}) / {tokens}
        = {loss:.4f}. It is near zero, and says only whether good completions were long. What counts
        is its gradient, which at each token's log-probability is -A / {tokens}; a step goes against it, so
        A / {tokens} is the push that the token gets.""",
        table(rows),
        f"""From there it goes back through the decoder ({at(grpo_update)}). At the logits, log p of a
        token has the gradient 1 - p at that token: where the model was certain there is nothing to push,
        and nearly everything comes from the few tokens that were open choices. The last column is the
        norm of the gradient of each completion by itself. Together they have norm
        {walk.gradient_norm():.3f}, less than these add up to, as right and wrong ones share tokens and pull
        against each other. By part of the model: {norms}. Tokens clipped so far:
        {sum(clip_counts(walk.logprobs(), *walk.clipping))}.""",
    ]


def step_stop(walk: Walk) -> list[str]:
    """The optimizer's step"""
    name, rate = "model.layers.3.mlp.down_proj.weight", walk.stage.learning_rate
    weight = walk.optimizer.parameters[name]
    gradient, before = weight.grad[0, :4].tolist(), weight[0, :4].tolist()
    norm = walk.optimizer.step(rate)
    walk.after_one_step = {name: tensor.clone() for name, tensor in walk.model.state_dict().items()}
    rows = [("weight", "before", "gradient", "after", "change / rate")]
    for n, (old, slope, new) in enumerate(zip(before, gradient, weight[0, :4].tolist(), strict=True)):
        rows.append((f"[0, {n}]", f"{old:.4f}", f"{slope:.5f}", f"{new:.4f}", f"{(new - old) / rate:.2f}"))
    return [
        f"""The gradient's norm, {norm:.3f}, is below the limit of {MAX_GRAD_NORM:g}, so
        {at(Optimizer.step)} does not scale it down. AdamW divides the running mean of each weight's
        gradient by its running size. In the first step both are that one gradient, so every weight moves by
        about the learning rate, {rate:g}, up or down, however small its gradient. From `{name}`:""",
        table(rows),
        f"""The rate is the recipe's, without the {walk.stage.warmup_steps} steps of warm-up, which exist
        because of such first steps. It is large, since the model is small: large enough for one step to
        bring tokens to the clip.""",
    ]


def clip_stop(walk: Walk) -> list[str]:
    """The same tokens after the step, and the clip"""
    logprobs, old, stage, tokens = (
        walk.logprobs(),
        walk.batch.old_logprobs,
        walk.stage,
        int(walk.batch.mask.sum()),
    )
    ratio = (logprobs - old).exp()
    without_gradient = (walk.pushes() == 0) & walk.batch.mask
    low, high = clip_counts(logprobs, *walk.clipping)
    own = [("t", "token", "old logprob", "new logprob", "ratio")]
    for t, token_id in enumerate(walk.samples[FOLLOWED].completion_ids):
        if abs(ratio[FOLLOWED, t] - 1) > 0.04:
            numbers = (show(column[FOLLOWED, t]) for column in (old, logprobs, ratio))
            own.append((str(t), walk.token(token_id), *numbers))
    rows = [("completion", "t", "token", "advantage", "old logprob", "new logprob", "ratio")]
    for n, t in without_gradient.nonzero().tolist():
        numbers = (walk.batch.advantages[n], old[n, t], logprobs[n, t], ratio[n, t])
        rows.append((str(n), str(t), walk.token(int(walk.batch.target_ids[n, t])), *map(show, numbers)))
    changes = ", ".join(f"{change:+.2f}" for change in (logprobs - old).sum(1))
    return [
        f"""The weights have changed, so the trainer now gives the same ids other log-probabilities. In
        completion {FOLLOWED}, these ratios differ from one by more than 0.04:""",
        table(own),
        f"""Not all went up. The newline at t = 11 ends the search, at a hit. But completions 1 and 5 end
        theirs with it at a miss, so there it was pushed down, and the weights are shared. In order,
        the completions' log-probabilities changed by {changes}.""",
        f"""The clip range is {1 - stage.clip_low:g} to {1 + stage.clip_high:g}. Where A > 0 and the ratio
        is above it, or A < 0 and the ratio below, the clipped term is the minimum and has no gradient: the
        token has been pushed far enough. A good token that became rarer is never clipped, nor a bad one
        that became likelier. The tokens without gradient are these:""",
        table(rows),
        f"""{at(clip_counts)} finds {low} below and {high} above, so the clip fraction is {low + high} /
        {tokens} = {(low + high) / tokens:.3f}. Those below are the newlines with which three completions gave
        up, and a first `+`, which is no worse than a first `-`. Every token of a completion is pushed alike,
        whatever its part in the failure; right results in failing completions are pushed down too.""",
    ]


def second_stop(walk: Walk) -> list[str]:
    """The second update"""
    loss = walk.add_gradient(walk.samples)
    norm = walk.optimizer.step(walk.stage.learning_rate)
    low, high = clip_counts(walk.logprobs(), *walk.clipping)
    return [
        f"""{at(grpo_step)} takes {walk.stage.updates_per_step} optimizer steps with the completions of one
        step, each on its own part of the groups. With one group the second part is empty, so this page uses
        the group again. The loss is now
        {loss:.4f}: lower, as the policy went where it was pushed. The gradient comes from the
        tokens that are not clipped, and its norm is {norm:.3f}. After this step {low} tokens are clipped
        below and {high} above. With each further step these completions, sampled by an older policy, would
        say less. So new ones are sampled."""
    ]


def again_stop(walk: Walk) -> list[str]:
    """The same problem, the same random numbers"""
    again = sample_group(walk.model, walk.tokenizer, walk.recipe)
    rows = [("completion", "t", "u", "token then", "was", "is", "token now", "was", "is")]
    for n, (old, new) in enumerate(zip(walk.group, again, strict=True)):
        pairs = enumerate(zip(old.completion.token_ids, new.completion.token_ids, strict=False))
        t, ids = next(((t, pair) for t, pair in pairs if pair[0] != pair[1]), (0, None))
        if ids is None:
            continue
        was, now = (distributions(m, walk.prompt, old.completion)[t] for m in (walk.untrained, walk.model))
        row = [str(n), str(t), show(walk.uniforms[n, t])]
        for token_id in ids:
            row += [walk.token(token_id), show(was[token_id]), show(now[token_id])]
        rows.append(tuple(row))
    return [
        f"""{at(collect_rollouts)} with the same seed gives each completion the random numbers it had. So a
        completion repeats itself until a number falls on another token. The table has that first
        difference, with the probabilities before these two steps and now:""",
        table(rows),
        group_table(again),
        """That is what two steps on one group do. Completions 1 and 5 no longer give up at 41: good. But 1
        now drops a newline (`9/3=3+14`), and 5 does not even stop at 42: it calls it too low and goes on.
        Too large a step on too few completions also changes what was right. A run takes steps of twelve
        groups of sixteen. There the same sums and newlines occur in good and bad completions, so their
        pushes cancel, and what sets the good ones apart is learned: [README](../README.md) has the curve.""",
    ]


def whole_stop(walk: Walk) -> list[str]:
    """The whole step in one call"""
    model, tokenizer = load_model("tiny-256")
    recipe = walk.recipe
    groups, advantages, metrics = grpo_step(
        Trainer(model, Optimizer(model, recipe.optimizer)),
        tokenizer,
        recipe.task,
        [PROBLEM],
        settings=replace(walk.stage, samples_per_prompt=SAMPLES, updates_per_step=1),
        sampling=recipe.sampling,
        learning_rate=walk.stage.learning_rate,
        seed=SEED,
        reward=recipe.reward,
    )
    weights = model.state_dict()
    same_weights = all(torch.equal(weights[name], tensor) for name, tensor in walk.after_one_step.items())
    names = ("loss", "grad_norm", "policy_entropy", "clip_fraction", "log_ratio_mean", "log_ratio_std")
    rows = [("metric", "value"), *((name, f"{metrics[name] + 0.0:.4f}") for name in names)]
    return [
        f"""Sections 1 to 10 are one function, {at(grpo_step)}, which is what a run calls at each step. Here
        it takes the model as it was, the same problem and seed, and makes one update. Are its completions
        those above? {yes(groups[0] == walk.group)}. And its advantages?
        {yes(torch.equal(advantages[0], walk.batch.advantages))}. Does the model end with exactly the
        weights of section 10? {yes(same_weights)}. It returns the rollouts, the advantages and these metrics,
        among others:""",
        table(rows),
    ]


STOPS = (
    prompt_stop, ids_stop, prefill_stop, sampling_stop, verdict_stop, advantage_stop, batch_stop, ratio_stop,
    loss_stop, step_stop, clip_stop, second_stop, again_stop, whole_stop,
)  # fmt: skip


# Markdown


def page() -> str:
    """The tour as Markdown."""
    walk = begin()
    parts = ["# A tour: one problem through the whole system", OPENING]
    for number, stop in enumerate(STOPS, 1):
        parts += [f"## {number}. {stop.__doc__}", *stop(walk)]
    parts += ["## Where to go on", CLOSING]
    return "\n\n".join(part if part.startswith(("#", "```")) else paragraph(part) for part in parts) + "\n"


def at(thing) -> str:
    """A link to the file of a function or class."""
    return f"[`{thing.__qualname__}`](../{thing.__module__.replace('.', '/')}.py)"


def show(number: Tensor | float) -> str:
    return f"{round(float(number), 3) + 0.0:.3f}"  # + 0.0: no minus before a zero


def yes(answer: bool) -> str:
    return "Yes" if answer else "NO"


def paragraph(text: str) -> str:
    return fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def lines(words: list[str]) -> str:
    """Words in lines; a word with spaces in it stays whole."""
    joined = "  ".join(word.replace(" ", "\0") for word in words)
    return fill(joined, 100, break_on_hyphens=False).replace("\0", " ")


def code(text: str) -> str:
    return f"```\n{text}\n```"


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns of text below their names, the first row; columns of numbers are aligned on the right."""
    columns = []
    for name, *cells in zip(*rows, strict=True):
        is_number = all(re.fullmatch(r"[-+.,\d]*", cell) for cell in cells)
        width = max(map(len, (name, *cells)))
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in (name, *cells)])
    return code("\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True)))


def group_table(group: list[Rollout]) -> str:
    rows = [("completion", "tokens", "outcome", "reward", "text")]
    for n, rollout in enumerate(group):
        length = len(rollout.completion.token_ids)
        rows.append((str(n), str(length), rollout.outcome, f"{rollout.reward:.1f}", repr(rollout.text)))
    return table(rows)


def main(out: Path | None = None) -> None:
    """Make the tour.

    Args:
        out: file to write instead of printing.
    """
    torch.set_num_threads(1)
    if out is None:
        print(page(), end="")
    else:
        out.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
