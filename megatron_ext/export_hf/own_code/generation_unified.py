"""Generation: text by transformers' own loops; pictures, and text with pictures, by the loop here.

Pictures need a loop of their own: with classifier-free guidance every document is decoded twice, after its prompt and
after the prompt without its text, and both must get the same sampled token.
"""

import hashlib

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from .cache_unified import UnifiedCache
from .configuration_unified import GENERATION, UNDERSTANDING


class TextOnly(LogitsProcessor):
    """Forbids all tokens that are not text or an end."""

    def __init__(self, allowed):
        self.allowed = allowed

    def __call__(self, input_ids, scores):
        return scores.masked_fill(~self.allowed.to(scores.device), -torch.inf)


class Document:
    """The continuation of one prompt: which token is forced next, which may be sampled, and when it ends.

    A picture that has begun is completed, with ``<eoi>`` after it. Text ends at an end token or after ``text_left``
    tokens; then the pictures that are missing are drawn. It is over after the last picture, if pictures were asked for.
    """

    def __init__(self, model, last_token, images, text_tokens, ends):
        config = model.config
        self.boi, self.eoi, self.ends = config.boi_token_id, config.eoi_token_id, ends
        self.size = config.grid[0] * config.grid[1]
        self.images_left, self.text_left = images, text_tokens
        self.codes_left = self.size if last_token == self.boi else 0
        self.with_images, self.close, self.done = images > 0, False, False
        self._settle()

    @property
    def forced(self):
        """The token that must come next, or None."""
        if self.close:
            return self.eoi
        return self.boi if not self.codes_left and self.images_left and not self.text_left else None

    def append(self, token):
        if self.codes_left:
            self.codes_left -= 1
            self.close = not self.codes_left
        elif self.close:
            self.close, self.images_left = False, self.images_left - 1
        elif token == self.boi:
            self.codes_left = self.size
        elif token in self.ends:
            self.done = True
        else:
            self.text_left -= 1
        self._settle()

    def _settle(self):
        if not self.codes_left and not self.close and not self.images_left:
            self.done |= self.with_images or not self.text_left


class UnifiedGenerationMixin(GenerationMixin):
    """``generate`` in the modes text, image and interleaved."""

    @torch.no_grad()
    def generate(self, inputs=None, generation_mode="text", **kwargs):
        """Continue prompts, which are padded on the left.

        ``generation_mode``:

        - ``text``: as in every model of transformers; returns prompts (with the codes of their pictures) and text.
        - ``image``: prompts end in ``<boi>``; returns the tokens of a picture for each, [b, h * w]
          (:meth:`decode_image_tokens`).
        - ``interleaved``: text and at most ``images`` pictures; returns prompts and what follows.

        The arguments of the last two are those of :meth:`draw`.
        """
        input_ids = kwargs.pop("input_ids", None)
        input_ids = inputs if input_ids is None else input_ids
        input_ids = self.fill_placeholders(input_ids, kwargs.pop("pixel_values", None))
        if generation_mode == "text":
            processors = LogitsProcessorList([TextOnly(self._allowed(begin_image=False))])
            processors.extend(kwargs.pop("logits_processor", None) or [])
            if kwargs.get("use_cache") is not False and kwargs.get("past_key_values") is None:
                kwargs["past_key_values"] = UnifiedCache(self.config.num_hidden_layers)
            return super().generate(input_ids, logits_processor=processors, **kwargs)
        if generation_mode == "image":
            if not (input_ids[:, -1] == self.config.boi_token_id).all():
                raise ValueError("generation_mode='image': every prompt must end in <boi>")
            if others := kwargs.keys() & {"images", "max_new_tokens"}:
                raise ValueError(
                    f"generation_mode='image' draws one picture for each prompt: leave out {sorted(others)}"
                )
            tokens = self.draw(input_ids, **kwargs)[:, input_ids.shape[1] :]
            return tokens[:, : self.config.grid[0] * self.config.grid[1]]
        if generation_mode == "interleaved":
            return self.draw(input_ids, **({"token_uses": torch.full_like(input_ids, UNDERSTANDING)} | kwargs))
        raise ValueError(f"generation_mode {generation_mode!r}: must be text, image or interleaved")

    def draw(
        self,
        input_ids,
        attention_mask=None,
        token_uses=None,
        images=1,
        max_new_tokens=0,
        guidance_scale=1.0,
        negative_prompt_ids=None,
        negative_prompt_attention_mask=None,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        seed=None,
        numbers=None,
        eos_token_id=None,
        **settings,
    ):
        """Prompts [b, n] with their text and pictures, [b, n + the longest], padded on the right.

        Args:
            images, max_new_tokens: the most pictures and tokens of text.
            token_uses: [b, n]; by default a prompt is UNDERSTANDING, but GENERATION in the mode ``image`` if it has no
                images. What is drawn is GENERATION, text takes the use of the prompt's last token.
            guidance_scale: s in unconditional + s (conditional - unconditional).
            negative_prompt_ids: the unconditional prompts; by default the prompts without their text.
            seed, numbers: decide, for each row, which tokens are sampled, whatever else is in the batch; without a seed
                torch's random state decides.
            settings: others of transformers' generation are refused if they would change anything there.
        """
        self._refuse_others(settings)
        b, n = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if token_uses is None:
            token_uses = torch.where(self._is_image(input_ids).any(1, keepdim=True), UNDERSTANDING, GENERATION)
            token_uses = token_uses.expand(b, n)
        ends = eos_token_id if eos_token_id is not None else self.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        documents = [Document(self, last, images, max_new_tokens, ends) for last in input_ids[:, -1].tolist()]
        chooser = _Chooser(do_sample, temperature, top_k, top_p, seed, range(b) if numbers is None else numbers, b)
        tokens, ids, uses, guided = input_ids, input_ids, token_uses, guidance_scale != 1
        if guided:
            negative = self._negative(ids, mask, uses, negative_prompt_ids, negative_prompt_attention_mask)
            ids, mask, uses = (_stack_left_padded(*pair) for pair in zip((ids, mask, uses), negative))
        cache, allowed = UnifiedCache(self.config.num_hidden_layers), self._kinds()
        while not all(document.done for document in documents):
            output = self(ids, attention_mask=mask, token_uses=uses, past_key_values=cache, logits_to_keep=1)
            logits = output.logits[:, -1, : allowed.shape[1]].float()
            if guided:
                logits = logits[b:] + guidance_scale * (logits[:b] - logits[b:])
            ids = self._next(documents, logits, allowed, chooser)
            tokens = torch.cat([tokens, ids[:, None]], 1)
            uses = torch.where(self._is_image(ids), GENERATION, token_uses[:, -1])
            real = torch.tensor([int(not document.done) for document in documents], device=ids.device)
            if guided:
                ids, uses, real = (x.repeat(2) for x in (ids, uses, real))
            ids, uses, mask = ids[:, None], uses[:, None], torch.cat([mask, real[:, None]], 1)
        return tokens

    def _next(self, documents, logits, allowed, chooser):
        """The next token of each document; padding for those that are done."""
        free = [i for i, document in enumerate(documents) if not document.done and document.forced is None]
        kinds = [2 if documents[i].codes_left else int(documents[i].images_left > 0) for i in free]
        chosen = dict(zip(free, chooser(logits[free], allowed[kinds], free))) if free else {}
        tokens = []
        for i, document in enumerate(documents):
            if document.done:
                tokens.append(self.config.pad_token_id)
            else:
                tokens.append(chosen[i] if document.forced is None else document.forced)
                document.append(tokens[-1])
        return torch.tensor(tokens, device=logits.device)

    def _is_image(self, ids):
        return (ids >= self.config.image_offset) & (ids < self.config.image_offset + self.config.codebook_size)

    def _allowed(self, begin_image):
        """Tokens of text and its ends, bool [vocab_size], with ``<boi>`` if asked for."""
        config = self.config
        ids = torch.arange(config.vocab_size, device=self.device)
        ends = torch.tensor(config.eos_token_id, device=self.device)
        text = (ids < config.text_size) & (ids != config.bos_token_id) | torch.isin(ids, ends)
        return text | (ids == config.boi_token_id) if begin_image else text

    def _kinds(self):
        """What may come next, bool [3, tokens in use]: text; text or ``<boi>``; a code."""
        size = self.config.image_offset + self.config.codebook_size
        ids = torch.arange(size, device=self.device)
        return torch.stack([self._allowed(False)[:size], self._allowed(True)[:size], self._is_image(ids)])

    def _negative(self, ids, mask, uses, given, given_mask):
        """The unconditional prompts, left-padded, with their masks and uses: those given, or the prompts without their
        text, of which the opening token, images and the last ``<boi>`` are left."""
        if given is not None:
            return given, torch.ones_like(given) if given_mask is None else given_mask, uses[:, -1:].expand(given.shape)
        config = self.config
        opening = (mask.cumsum(1) == 1) & mask.bool()
        kept = opening | self._is_image(ids) | (ids == config.boi_token_id) | (ids == config.eoi_token_id)
        order = kept.int().argsort(dim=1, stable=True)  # what is left out goes to the left, as padding
        longest = int(kept.sum(1).max())
        return tuple(x.gather(1, order)[:, -longest:] for x in (ids, kept.long(), uses))

    def _refuse_others(self, settings):
        """Refuse arguments that would be ignored, unless they change nothing."""
        neutral = [("num_beams", 1), ("num_return_sequences", 1)]
        settings = {name: value for name, value in settings.items() if name not in ("tokenizer", "use_cache")}
        if others := [name for name, value in settings.items() if value is not None and (name, value) not in neutral]:
            raise ValueError(f"pictures are drawn without the arguments {others}: leave them out")

    def prepare_inputs_for_generation(self, input_ids, *arguments, token_uses=None, **kwargs):
        """Generated text takes the use of the prompt's last token."""
        prepared = super().prepare_inputs_for_generation(input_ids, *arguments, **kwargs)
        if token_uses is not None:
            generated = input_ids.shape[1] - token_uses.shape[1]
            uses = torch.cat([token_uses, token_uses[:, -1:].expand(-1, generated)], 1)
            prepared["token_uses"] = uses[:, -prepared["input_ids"].shape[1] :]
        return prepared


class _Chooser:
    """Chooses the next token of each row: the likeliest, or sampled with numbers of the row's own generator."""

    def __init__(self, do_sample, temperature, top_k, top_p, seed, numbers, rows):
        if len(numbers) != rows:
            raise ValueError(f"{len(numbers)} numbers for {rows} prompts")
        self.temperature = (1.0 if temperature is None else temperature) if do_sample else 0
        self.top_k, self.top_p = top_k or 0, 1.0 if top_p is None else top_p
        seed = int(torch.randint(1 << 31, ())) if seed is None else seed
        digests = (hashlib.sha256(f"{seed}:{int(number)}".encode()).digest() for number in numbers)
        self.generators = [torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")) for digest in digests]

    def __call__(self, logits, allowed, rows):
        logits = logits.masked_fill(~allowed, -torch.inf)
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the tokens before have this mass already
            probabilities = probabilities.scatter(-1, order, ordered.masked_fill(beyond, 0))
        noise = [torch.empty(logits.shape[-1]).exponential_(generator=self.generators[row]) for row in rows]
        return (probabilities / torch.stack(noise).to(logits.device)).argmax(-1).tolist()


def _stack_left_padded(a, b):
    """[rows of a, then of b], zeros on the left of the shorter."""
    longest = max(a.shape[1], b.shape[1])
    return torch.cat([F.pad(x, (longest - x.shape[1], 0)) for x in (a, b)])
