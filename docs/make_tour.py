"""One problem followed through the whole system, with real numbers: `python -m docs.make_tour` prints what stands in docs/tour.md.

Each stop below is a heading, a few sentences, and what the functions that it names return for one group of completions.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from model import Qwen3, Tokenizer, generate, prompt_ids, render_chat, token_logprobs
from model.sampler import sample
from model.cache import GroupCache
from model.memory import token_bytes
from model.sampler import plain_completion
from model.sampler import DecodeBatch, prefill
from rl.advantage import group_advantages
from rl.batch import make_batch, score_completions
from rl.grpo import accumulate_gradient, grpo_update
from rl.learner import Learner
from rl.loss import clip_counts, grpo_loss
from docs.tour_markdown import at, code, group_table, lines, paragraph, show, table, yes
from rl.optimizer import Optimizer
from rl.rollout import Actor, collect_rollouts, paid, reward_tensor
from docs.tour_walk import FOLLOWED, MAX_NEW_TOKENS, PROBLEM, SAMPLES, Walk, begin, distributions, sample_group
from data.task import split_answer
from data.countdown import Countdown

OPENING = f"""What happens between a question and a better model, once, with real numbers and the function that does each
thing. The model is the embedded one, before any training. All else is as in `make train-256`, but for its size: one
problem, and {SAMPLES} completions of at most {MAX_NEW_TOKENS} tokens. `python -m docs.make_tour` ([tour.py](../rl/tour.py)) prints
this page, and a test compares the two. Completions are numbered from 0, and t counts the tokens of one, from 0."""
CLOSING = """[From REINFORCE to GRPO](algorithm.md) says why each formula is what it is; the [exercises](exercises.md) are
changes to make and to predict. In the code, read `plain_completion` in [sampler.py](../model/sampler.py), then
[qwen3.py](../model/qwen3.py), [wave.py](../model/wave.py), [grpo.py](../rl/grpo.py), [batch.py](../rl/batch.py),
[loss.py](../rl/loss.py), [steps.py](../rl/steps.py), where they meet, and [stages.py](../rl/stages.py), which repeats
that until a stage is done."""


def prompt_stop(walk: Walk) -> list[str]:
    """The prompt"""
    tokenizer, question = walk.actor.tokenizer, walk.actor.task.prompt(PROBLEM)
    return [
        f"""The problem is `{PROBLEM}`: reach {PROBLEM.target} with each number exactly once. The task ({at(Countdown.prompt)})
        asks for it in words, and {at(render_chat)} puts these into Qwen3's chat format. {at(prompt_ids)} opens `<think>` for
        the model, so that what it writes begins with its work.""",
        code(tokenizer.decode(prompt_ids(tokenizer, question, thinking=True)).strip()),
    ]


def ids_stop(walk: Walk) -> list[str]:
    """Ids"""
    words = [f"{token_id} {walk.token(token_id)}" for token_id in walk.prompt]
    words = [word if len(word) < 60 else f"{word[:30]}...'" for word in words]
    return [
        f"""The model knows no text, only ids ({at(Tokenizer.encode)}). The embedded model's tokenizer has
        {len(walk.actor.tokenizer)}: one for each fixed phrase of the prompt and each number below 200, and one for each byte.
        So the prompt is {len(words)} ids.""",
        code(lines(words)),
    ]


def prefill_stop(walk: Walk) -> list[str]:
    """Prefill: the prompt once for the whole group"""
    model, length, size = walk.untrained, len(walk.prompt), token_bytes(walk.untrained)
    with torch.no_grad():
        logits, cache = prefill(model, [walk.prompt])
    likeliest = token_logprobs(logits[0], 1.0, model.num_tokens).exp().topk(3)
    first, _ = sample(logits.expand(SAMPLES, -1), walk.uniforms[:, 0], model.num_tokens, 1.0)
    choices = [(walk.token(int(n)), show(p)) for p, n in zip(*likeliest, strict=True)]
    return [
        f"""One forward over the {length} ids ({at(prefill)}, {at(Qwen3.forward)}) gives the logits of the next token. It leaves
        in the cache what later tokens will ask of the prompt: a key and a value for each of its tokens, in each layer and
        key-value head. All {SAMPLES} completions read the same copy ({at(GroupCache)}).""",
        code(
            f"keys of one layer    {list(cache.keys[0].shape)}: prompts, key-value heads, tokens, head_dim\n"
            f"one token            {size:,} bytes: keys and values of {len(cache.keys)} layers, 4 bytes a number\n"
            f"prompt, stored once  {int(cache.lengths[0])} tokens, {size * length:,} bytes\n"
            f"{SAMPLES} copies would be    {SAMPLES * length} tokens, {size * SAMPLES * length:,} bytes"
        ),
        f"""The softmax of the logits ({at(token_logprobs)}) is the distribution of the first token. The likeliest of
        {model.num_tokens} ids are {", ".join(f"`{token}` ({chance})" for token, chance in choices)}: it begins with a number of
        the problem, and no other thing is worth a thousandth. Each completion draws with a random number of its own
        ({at(sample)}): {", ".join(f"`{walk.token(token_id)}`" for token_id in first.tolist())}.""",
    ]


def sampling_stop(walk: Walk) -> list[str]:
    """Sampling, token by token"""
    completion, uniforms = walk.group[FOLLOWED].completion, walk.uniforms[FOLLOWED]
    plain = plain_completion(walk.untrained, walk.prompt, uniforms, walk.actor.tokenizer.stop_token_ids, (1.0, None, None))
    probabilities = distributions(walk.untrained, walk.prompt, completion)
    rows = [("t", "id", "token", "u", "from", "to", "probability", "logprob")]
    for t, (token_id, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        high, width = probabilities[t, : token_id + 1].sum(), probabilities[t, token_id]
        rows.append(
            (str(t), str(token_id), walk.token(token_id), *map(show, (uniforms[t], high - width, high, width, logprob)))
        )
    return [
        f"""{at(generate)} continues all completions together, one token each a forward ({at(DecodeBatch)}), until the model writes
        `<|im_end|>` or the limit is reached, here {MAX_NEW_TOKENS} tokens. From now on we follow completion {FOLLOWED}. Imagine
        all ids side by side on the line from 0 to 1, each as wide as its probability; the id on which the random number u falls
        is taken. The table has its stretch, and the log of its width. That last column is kept with the completion: what the
        policy thought when it sampled. The ratio will be measured against it.""",
        table(rows),
        f"""The model is sure of its arithmetic, which it has learned, and of copying. It is open where there is something to
        choose: which numbers, which operation, whether to stop (t = 23), whether to write `<answer>` (t = 26). Only there can
        learning change much. {at(plain_completion)} is the same sampler in ten lines, without a cache. Does it find the same
        ids? {yes(plain.token_ids == completion.token_ids)}.""",
    ]


def verdict_stop(walk: Walk) -> list[str]:
    """Verdict and reward"""
    _, answer = split_answer(walk.group[FOLLOWED].text, thinking=True)
    return [
        f"""{at(Actor.judge)} decodes each completion, and the task judges the text ({at(Countdown.score)}): after its thinking
        it must give one `<answer>` ({at(split_answer)}), and exact arithmetic looks in there for each number once and for the
        target. Of completion {FOLLOWED} that is `{answer}`. {at(paid)} applies what the recipe says of near misses; this one
        pays for them what it pays for any wrong answer.""",
        group_table(walk.group),
        """The model knows `<answer>`, but has seen it only half the time: three of these reach the target and earn nothing.""",
    ]


def advantage_stop(walk: Walk) -> list[str]:
    """Advantage: better or worse than the group"""
    rewards = reward_tensor([walk.group])
    mean, std = rewards.mean().item(), rewards.std(correction=0).item()
    plain = [f"{reward:g}" for reward in rewards[0].tolist()]
    rows = [("completion", "reward", "advantage")]
    rows += [(str(n), plain[n], show(advantage)) for n, advantage in enumerate(group_advantages(rewards)[0])]
    return [
        f"""What is a reward of 0.1 worth? That depends on what else can be had. {at(group_advantages)} compares each reward
        with its group, which takes the place of other methods' critic. By hand:""",
        code(
            f"mean = ({' + '.join(plain)}) / {SAMPLES} = {mean:.3f}\n"
            f"std  = sqrt(({' + '.join(f'({reward} - {mean:.3f})^2' for reward in plain)}) / {SAMPLES}) = {std:.3f}\n"
            f"A    = (reward - mean) / (std + 0.0001) = (1 - {mean:.3f}) / {std + 1e-4:.4f} = {(1 - mean) / (std + 1e-4):.3f}"
            f" for completion {FOLLOWED}"
        ),
        table(rows),
        """They sum to zero. Had all earned the same, each would be zero, and the group would teach nothing.""",
    ]


def batch_stop(walk: Walk) -> list[str]:
    """The batch: shift and mask"""
    batch, length, longest = walk.batch, len(walk.samples[FOLLOWED].completion_ids), walk.batch.mask.shape[1]
    padded = len(walk.prompt) + longest - 1
    rows = [("t", "mask", "place", "input there", "target", "id", "old logprob")]
    for t in (0, 1, 2, length - 2, length - 1, length, longest - 1):
        place, target, mask, old = (x[FOLLOWED, t] for x in (batch.places, batch.target_ids, batch.mask, batch.old_logprobs))
        words = (str(int(place)), walk.token(int(batch.input_ids[0, place])), walk.token(int(target))) if mask else ("", "", "")
        rows.append((str(t), str(int(mask)), *words, str(int(target)), show(old)))
    return [
        f"""{at(make_batch)} is the one place that shifts and masks. All completions lie in one stream, in which the prompt
        stands once: {batch.input_ids.shape[1]} tokens, where rows padded to the longest would be {SAMPLES} x {padded} =
        {SAMPLES * padded}. A model predicts the *next* token, so the target at t, the completion's own token there, is
        predicted one place earlier in the stream; for t = 0 that is at the prompt's last id. Of row {FOLLOWED} of the tensors,
        [{SAMPLES}, {longest}] in size:""",
        table(rows),
        f"""The mask is made from the length, {length}. The stop id is a target like any other, since stopping has to be
        learned; what lies behind it counts for nothing.""",
    ]


def ratio_stop(walk: Walk) -> list[str]:
    """The trainer's log-probabilities, and the ratio"""
    with torch.no_grad():
        logprobs, entropy = score_completions(walk.learner.model, walk.batch)
    old, (_, ratio) = walk.batch.old_logprobs, walk.ratio()
    rows = [("t", "token", "sampler", "trainer", "ratio", "entropy")]
    for t, token_id in enumerate(walk.samples[FOLLOWED].completion_ids[:10]):
        rows.append((str(t), walk.token(token_id), *(show(x[FOLLOWED, t]) for x in (old, logprobs, ratio, entropy))))
    return [
        f"""The sampler went token by token through a cache; the trainer takes the whole stream in one forward
        ({at(score_completions)}). Both make log-probabilities of logits in the same function, {at(token_logprobs)}, and have to
        agree. Do all {int(walk.batch.mask.sum())} tokens, to 0.0001? {yes((logprobs - old).abs().max() < 1e-4)}. So the ratio
        exp(trainer - sampler) is one everywhere until the weights move. The entropy beside it, in nats, says how open the
        choice was.""",
        table(rows),
    ]


def loss_stop(walk: Walk) -> list[str]:
    """The loss and its gradient"""
    learner, tokens = walk.learner, int(walk.batch.mask.sum())
    rows, total = [("completion", "advantage", "tokens", "A x tokens", "push a token", "gradient norm alone")], 0.0
    for n, (one, push) in enumerate(zip(walk.samples, walk.pushes()[:, 0], strict=True)):
        accumulate_gradient(learner, [one], walk.stage, denominator=tokens)
        norm, count = walk.gradient_norm(), len(one.completion_ids)
        learner.optimizer.clear_gradients()
        rows.append((str(n), show(one.advantage), str(count), f"{one.advantage * count:.2f}", f"{push:.4f}", show(norm)))
        total += one.advantage * count
    sums = accumulate_gradient(learner, walk.samples, walk.stage)
    parts = ["embed_tokens", *(f"layers.{n}" for n in range(walk.untrained.config.num_hidden_layers))]
    return [
        f"""{at(grpo_loss)} is the mean over all tokens of -min(ratio x A, clip(ratio) x A). While every ratio is one, that is
        minus the sum of A x tokens, over the tokens: -({total:.2f}) / {tokens} = {sums["loss"]:.4f}. It is near zero, and says
        only whether good completions were long. What counts is its gradient, which at each token's log-probability is -A /
        {tokens}; a step goes against it, so A / {tokens} is the push that the token gets.""",
        table(rows),
        f"""From there it goes back through the decoder ({at(accumulate_gradient)}). At the logits, log p of a token has the
        gradient 1 - p at that token: where the model was certain there is nothing to push, and nearly everything comes from the
        third of the tokens that were open choices. The last column is each completion's gradient by itself. Together they have
        norm {walk.gradient_norm():.3f}, less than the largest alone, as right and wrong ones share tokens and pull against each
        other. By part of the model: {", ".join(f"{part} {walk.gradient_norm(part):.3f}" for part in parts)}. Tokens clipped so
        far: {int(sums["clipped_low"] + sums["clipped_high"])}.""",
    ]


def step_stop(walk: Walk) -> list[str]:
    """The optimizer's step"""
    name, rate = "model.layers.3.mlp.down_proj.weight", walk.stage.learning_rate
    weight = walk.learner.optimizer.parameters[name]
    gradient, before = weight.grad[0, :4].tolist(), weight[0, :4].tolist()
    norm = walk.learner.step(rate)
    rows = [("weight", "before", "gradient", "after", "change / rate")]
    for n, (old, slope, new) in enumerate(zip(before, gradient, weight[0, :4].tolist(), strict=True)):
        rows.append((f"[0, {n}]", f"{old:.4f}", f"{slope:.5f}", f"{new:.4f}", f"{(new - old) / rate:.2f}"))
    return [
        f"""{at(Learner.step)} hands the gradient to {at(Optimizer.step)}. Its norm, {norm:.3f}, is below the limit of
        {walk.learner.recipe.optimizer.max_grad_norm:g}, so it is not scaled down. AdamW divides the running mean of each
        weight's gradient by its running size. In the first step both are that one gradient, so every weight moves by the
        learning rate, {rate:g}, up or down, however small its gradient. From `{name}`:""",
        table(rows),
        f"""The rate is the recipe's, without the {walk.stage.warmup_steps} steps of warm-up that such first steps are the
        reason for. It is large, since the model is small: large enough for one step to bring tokens to the clip.""",
    ]


def clip_stop(walk: Walk) -> list[str]:
    """The same tokens after the step, and the clip"""
    (logprobs, ratio), old, stage, tokens = walk.ratio(), walk.batch.old_logprobs, walk.stage, int(walk.batch.mask.sum())
    silenced, (low, high) = (walk.pushes() == 0) & walk.batch.mask, walk.clipped()
    own = [("t", "token", "old logprob", "new logprob", "ratio")]
    for t, token_id in enumerate(walk.samples[FOLLOWED].completion_ids):
        if abs(ratio[FOLLOWED, t] - 1) > 0.04:
            own.append((str(t), walk.token(token_id), *(show(x[FOLLOWED, t]) for x in (old, logprobs, ratio))))
    rows = [("completion", "t", "token", "advantage", "old logprob", "new logprob", "ratio")]
    for n, t in silenced.nonzero().tolist():
        numbers = (walk.batch.advantages[n], old[n, t], logprobs[n, t], ratio[n, t])
        rows.append((str(n), str(t), walk.token(int(walk.batch.target_ids[n, t])), *map(show, numbers)))
    return [
        f"""The weights have moved, so the trainer now gives the same ids other log-probabilities. Those of completion
        {FOLLOWED} whose ratio is more than 0.04 off one:""",
        table(own),
        f"""Not all went up. The newline at t = 23 ends the search: right here, but the four malformed completions end theirs in
        the same way, and they were pushed down. All share the weights. In order, the completions' log-probabilities changed by
        {", ".join(f"{change:+.2f}" for change in (logprobs - old).sum(1))}.""",
        f"""The clip range is {1 - stage.clip_low:g} to {1 + stage.clip_high:g}. Where A > 0 and the ratio is above it, or A < 0
        and the ratio below, the clipped term is the minimum and has no gradient: the token has had its push. A good token that
        became rarer is never clipped, nor a bad one that became likelier. The tokens without gradient are these:""",
        table(rows),
        f"""{at(clip_counts)} finds {low} below and {high} above, so the clip fraction is {low + high} / {tokens} =
        {(low + high) / tokens:.3f}. Half of those below are the newline that ends a search.""",
    ]


def second_stop(walk: Walk) -> list[str]:
    """The second update"""
    sums = accumulate_gradient(walk.learner, walk.samples, walk.stage)
    norm = walk.learner.step(walk.stage.learning_rate)
    low, high = walk.clipped()
    return [
        f"""{at(grpo_update)} takes {walk.stage.updates_per_step} optimizer steps a rollout batch, each on its own share of the
        groups. Here is one group, so it is used twice. The loss is now {sums["loss"]:.4f}: lower, as the policy went where it
        was pushed. The gradient comes from the tokens that the clip has left, and its norm is {norm:.3f}. After this step {low}
        tokens are clipped below and {high} above. With each further step these completions, drawn by a policy that is gone,
        would say less. So new ones are sampled.""",
    ]


def again_stop(walk: Walk) -> list[str]:
    """The same problem, the same random numbers"""
    again = sample_group(walk.actor, walk.learner.recipe)
    rows = [("completion", "t", "u", "token then", "was", "is", "token now", "was", "is")]
    for n, (old, new) in enumerate(zip(walk.group, again, strict=True)):
        pairs = enumerate(zip(old.completion.token_ids, new.completion.token_ids, strict=False))
        t, ids = next((t, pair) for t, pair in pairs if pair[0] != pair[1])
        was, now = (distributions(model, walk.prompt, old.completion)[t] for model in (walk.untrained, walk.learner.model))
        chances = [(walk.token(token_id), show(was[token_id]), show(now[token_id])) for token_id in ids]
        rows.append((str(n), str(t), show(walk.uniforms[n, t]), *chances[0], *chances[1]))
    return [
        f"""{at(collect_rollouts)} with the same seed gives each completion the random numbers it had. So it repeats itself
        until a number falls on another token. There it parts from its old self; the probabilities are those before training and
        now:""",
        table(rows),
        group_table(again),
        """That is what two steps on one group do. Completions 0 and 2 now write `<answer>`, the clearest thing that told good
        from bad. Completion 5 divides no more. There are side effects: 3 and 4 search until they are cut off, as ending the
        search was punished wherever the tag was missing, and 1 calls its right result too low, and has to find it again. Six
        samples of one problem prove nothing either way. A run takes 180 such steps with twelve groups of sixteen, where one
        group's accidents weigh little; [README](../README.md) has its curve.""",
    ]


STOPS = (
    prompt_stop, ids_stop, prefill_stop, sampling_stop, verdict_stop, advantage_stop, batch_stop, ratio_stop, loss_stop,
    step_stop, clip_stop, second_stop, again_stop,
)  # fmt: skip


def page() -> str:
    """The tour as Markdown."""
    walk, parts = begin(), ["# A tour: one problem through the whole system", OPENING]
    for number, stop in enumerate(STOPS, 1):
        parts += [f"## {number}. {stop.__doc__}", *stop(walk)]
    parts += ["## Where to go on", CLOSING]
    return "\n\n".join(part if part.startswith(("#", "```")) else paragraph(part) for part in parts) + "\n"


@dataclass(frozen=True)
class Arguments:
    out: Path | None = None
    """File to write instead of printing."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    a = tyro.cli(Arguments, description=__doc__)
    print(page(), end="") if a.out is None else a.out.write_text(page(), encoding="utf-8")
