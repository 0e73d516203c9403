"""Keys and values of the tokens read so far, in a form that stock generation (beams included) can handle."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class LayerCache(DynamicLayer):
    """The keys and values of one layer [b, heads, columns, d], the columns' numbers [columns], and which rows have a
    key in them, [b, columns]."""

    columns = present = None

    def append(self, key, value, columns, present):
        if self.keys is None:
            self.keys, self.values, self.columns, self.present = key, value, columns, present
            self.is_initialized = True
        else:
            self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
            self.columns, self.present = torch.cat([self.columns, columns]), torch.cat([self.present, present], 1)
        return self.keys, self.values, self.columns, self.present

    def select(self, rows=slice(None), columns=slice(None)):
        if self.keys is not None:
            self.keys, self.values = self.keys[rows][:, :, columns], self.values[rows][:, :, columns]
            self.columns, self.present = self.columns[columns], self.present[rows][:, columns]


class UnifiedCache(DynamicCache):
    """What layers keep of the tokens read so far: a token takes room only in the layers that it does not skip.

    Attributes:
        places: [b, tokens read], each token's place in its image, from 1; 0 for text. None: nothing was read.
    """

    def __init__(self, num_layers):
        super().__init__()
        self.layers, self.layer_class_to_replicate = [LayerCache() for _ in range(num_layers)], None
        self.places = None

    def get_seq_length(self, layer_idx=0):
        """Tokens read, whatever the layer keeps of them: stock generation cuts its inputs by this number."""
        return 0 if self.places is None else self.places.shape[1]

    def batch_select_indices(self, indices):
        if self.places is not None:
            self.places = self.places[indices]
        for layer in self.layers:
            layer.select(rows=indices)

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats):
        self.batch_select_indices(torch.arange(len(self.places), device=self.places.device).repeat_interleave(repeats))

    def crop(self, length):
        """Keep the first ``length`` tokens, or leave out the last ``-length``."""
        length = min(length, self.get_seq_length()) if length > 0 else self.get_seq_length() + length
        if self.places is not None:
            self.places = self.places[:, :length]
        for layer in self.layers:
            if layer.columns is not None:
                layer.select(columns=layer.columns < length)

    def reset(self):
        self.__init__(len(self.layers))
