"""Recurrent networks and embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from examples.benchmarks.awkward_parts.base import Collection, Net, sequence, words

RECURRENT = Collection()


def recurrent(layer, width, first=True, **parts):
    """A recurrent layer between two linear ones."""

    def forward(net, x):
        y = net.layer(F.relu(net.embed(x if first else x.transpose(0, 1))))[0]
        y = y[:, -1] if first else y[-1]
        return net.head(F.relu(net.hidden(y)))

    ends = {"embed": nn.Linear(6, 10), "hidden": nn.Linear(width, 14), "head": nn.Linear(14, 9)}
    return Net(forward, layer=layer, **ends, **parts)


@RECURRENT.add("nn.LSTM", sequence)
def lstm():
    return recurrent(nn.LSTM(10, 12, batch_first=True), 12)


@RECURRENT.add("nn.LSTM of two layers in both directions, time first, with dropout", sequence)
def lstm_bidirectional():
    return recurrent(nn.LSTM(10, 11, 2, bidirectional=True, dropout=0.2), 22, first=False)


@RECURRENT.add("nn.LSTM with projected states", sequence)
def lstm_projected():
    return recurrent(nn.LSTM(10, 12, batch_first=True, proj_size=5), 5)


@RECURRENT.add("nn.LSTM without biases", sequence)
def lstm_no_bias():
    return recurrent(nn.LSTM(10, 12, batch_first=True, bias=False), 12)


@RECURRENT.add("nn.GRU", sequence)
def gru():
    return recurrent(nn.GRU(10, 12, batch_first=True), 12)


@RECURRENT.add("nn.GRU of two layers in both directions", sequence)
def gru_bidirectional():
    return recurrent(nn.GRU(10, 11, 2, bidirectional=True, batch_first=True), 22)


@RECURRENT.add("nn.RNN of two layers with tanh", sequence)
def rnn():
    return recurrent(nn.RNN(10, 12, 2, batch_first=True), 12)


@RECURRENT.add("nn.RNN with relu", sequence)
def rnn_relu():
    return recurrent(nn.RNN(10, 12, nonlinearity="relu", batch_first=True), 12)


@RECURRENT.add("nn.LSTM whose first states are made from the input", sequence)
def lstm_given_state():
    def forward(net, x):
        start = (net.state(x[:, 0])[None], torch.zeros(1, len(x), net.layer.hidden_size))
        y, (last, _) = net.layer(x, start)
        return net.head(F.relu(net.hidden(last[0]))) + net.head(F.relu(net.hidden(y.mean(1))))

    parts = {"state": nn.Linear(6, 12), "layer": nn.LSTM(6, 12, batch_first=True), "hidden": nn.Linear(12, 14)}
    return Net(forward, head=nn.Linear(14, 9), **parts)


@RECURRENT.add("nn.GRU over packed sequences of different lengths", sequence)
def gru_packed():
    def forward(net, x):
        packed = pack_padded_sequence(net.embed(x), torch.tensor([7, 5]), batch_first=True)
        y, _ = pad_packed_sequence(net.layer(packed)[0], batch_first=True)
        return net.head(F.relu(net.hidden(y.sum(1))))

    parts = {"embed": nn.Linear(6, 10), "layer": nn.GRU(10, 12, batch_first=True), "hidden": nn.Linear(12, 14)}
    return Net(forward, head=nn.Linear(14, 9), **parts)


@RECURRENT.add("nn.LSTMCell in a loop", sequence)
def lstm_cell():
    def forward(net, x):
        h = c = x.new_zeros(len(x), net.cell.hidden_size)
        for step in net.embed(x).unbind(1):
            h, c = net.cell(step, (h, c))
        return net.head(F.relu(net.hidden(h)))

    parts = {"embed": nn.Linear(6, 10), "cell": nn.LSTMCell(10, 12), "hidden": nn.Linear(12, 14)}
    return Net(forward, head=nn.Linear(14, 9), **parts)


@RECURRENT.add("nn.GRUCell in a loop, its first state left out", sequence)
def gru_cell():
    def forward(net, x):
        h = None
        for step in net.embed(x).unbind(1):
            h = net.cell(step, h)
        return net.head(F.relu(net.hidden(h)))

    parts = {"embed": nn.Linear(6, 10), "cell": nn.GRUCell(10, 12), "hidden": nn.Linear(12, 14)}
    return Net(forward, head=nn.Linear(14, 9), **parts)


@RECURRENT.add("an embedding whose table is the output layer too", words)
def tied_embedding():
    def forward(net, x):
        return F.linear(net.down(F.relu(net.up(net.table(x)))), net.table.weight)

    return Net(forward, table=nn.Embedding(23, 10), up=nn.Linear(10, 14), down=nn.Linear(14, 10))


@RECURRENT.add("an embedding that shares its parameter with the output layer", words)
def tied_embedding_module():
    net = Net(lambda net, x: net.out(F.relu(net.table(x))), table=nn.Embedding(23, 10), out=nn.Linear(10, 23))
    net.out.weight = net.table.weight
    return net


@RECURRENT.add("an embedding with a padding word and a largest length", words)
def embedding_padding():
    def forward(net, x):
        return net.head(F.relu(net.hidden(net.table(x % 9).sum(1))))

    table = nn.Embedding(23, 10, padding_idx=0)
    return Net(forward, table=table, hidden=nn.Linear(10, 14), head=nn.Linear(14, 9))


@RECURRENT.add("nn.EmbeddingBag by mean", words)
def embedding_bag():
    def forward(net, x):
        return net.head(F.relu(net.hidden(net.table(x))))

    return Net(forward, table=nn.EmbeddingBag(23, 10), hidden=nn.Linear(10, 14), head=nn.Linear(14, 9))


@RECURRENT.add("nn.EmbeddingBag by largest value, with offsets", words)
def embedding_bag_max():
    def forward(net, x):
        offsets = torch.tensor([0, 4, 9])
        return net.head(F.relu(net.hidden(net.table(x.flatten(), offsets))))

    table = nn.EmbeddingBag(23, 10, mode="max")
    return Net(forward, table=table, hidden=nn.Linear(10, 14), head=nn.Linear(14, 9))


@RECURRENT.add("two embeddings added and a third joined", words)
def embeddings_combined():
    def forward(net, x):
        y = net.words(x) + net.places(torch.arange(x.shape[1]))
        y = torch.cat([y, net.kinds(x % 3)], dim=-1)
        return net.head(F.relu(net.hidden(y)).mean(1))

    tables = {"words": nn.Embedding(23, 10), "places": nn.Embedding(7, 10), "kinds": nn.Embedding(3, 5)}
    return Net(forward, hidden=nn.Linear(15, 14), head=nn.Linear(14, 9), **tables)
