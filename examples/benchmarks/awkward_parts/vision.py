"""Detection heads, samplers and encoder-decoder networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import DeformConv2d, FeaturePyramidNetwork, deform_conv2d, nms, roi_align

from examples.benchmarks.awkward_parts.base import Collection, Net, conv, image, parameter

VISION = Collection()


@VISION.add("a detection head: best places by topk, then non-maximum suppression", image)
def detection_head():
    def forward(net, x):
        x = F.relu(net.last(F.relu(net.first(x))))
        scores = net.scores(x).sigmoid().flatten(1)
        boxes = net.boxes(x).flatten(2).transpose(1, 2).sigmoid()
        found = []
        for score, box in zip(scores, boxes, strict=True):
            best, where = score.topk(9)
            corners = torch.cat([box[where, :2], box[where, :2] + box[where, 2:]], dim=1)
            kept = nms(corners, best, 0.5)[:3]
            found.append({"boxes": corners[kept], "scores": best[kept]})
        return {"scores": scores, "boxes": boxes, "found": found}

    convs = {"first": conv(3, 10), "last": conv(10, 14), "scores": conv(14, 1), "boxes": conv(14, 4)}
    return Net(forward, **convs)


@VISION.add("anchors joined over two scales", image)
def anchor_head():
    def forward(net, x):
        small = F.relu(net.first(x))
        large = F.relu(net.down(small))
        maps = [net.head(net.smooth(small)), net.head(net.smooth_down(large))]
        return torch.cat(
            [m.unflatten(1, (-1, net.classes)).flatten(3).permute(0, 3, 1, 2).flatten(1, 2) for m in maps], 1
        )

    convs = {"first": conv(3, 10), "down": nn.Conv2d(10, 14, 3, 2), "smooth": conv(10, 11), "smooth_down": conv(14, 11)}
    return Net(forward, classes=5, head=conv(11, 15), **convs)


@VISION.add("a feature pyramid", image)
def feature_pyramid():
    def forward(net, x):
        small = F.relu(net.first(x))
        levels = net.pyramid({"a": small, "b": F.relu(net.down(small))})
        return [net.head(F.relu(level)) for level in levels.values()]

    pyramid = FeaturePyramidNetwork([10, 14], 11)
    return Net(forward, first=conv(3, 10), down=nn.Conv2d(10, 14, 3, 2), pyramid=pyramid, head=conv(11, 9, 1))


@VISION.add("deformable convolution, offsets and masks from a convolution", image)
def deformable():
    def forward(net, x):
        x = F.relu(net.first(x))
        x = deform_conv2d(x, net.offset(x), net.weight, net.bias, padding=1, mask=net.mask(x).sigmoid())
        return net.head(F.relu(net.last(F.relu(x))).mean((2, 3)))

    convs = {"first": conv(3, 10), "offset": conv(10, 18), "mask": conv(10, 9), "last": conv(12, 14)}
    return Net(forward, weight=parameter(12, 10, 3, 3), bias=parameter(12), head=nn.Linear(14, 9), **convs)


@VISION.add("torchvision's DeformConv2d", image)
def deformable_module():
    def forward(net, x):
        x = F.relu(net.first(x))
        x = F.relu(net.deform(x, net.offset(x)))
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    convs = {"first": conv(3, 10), "offset": conv(10, 18), "last": conv(12, 14)}
    return Net(forward, deform=DeformConv2d(10, 12, 3, padding=1), head=nn.Linear(14, 9), **convs)


@VISION.add("roi_align of fixed boxes", image)
def region_features():
    def forward(net, x):
        x = F.relu(net.first(x))
        boxes = [torch.tensor([[0.0, 0, 4, 5], [1, 2, 5, 6]]), torch.tensor([[2.0, 1, 5, 7]])]
        regions = roi_align(x, boxes, (2, 3))
        return net.head(F.relu(net.hidden(regions.flatten(1))))

    return Net(forward, first=conv(3, 10), hidden=nn.Linear(60, 14), head=nn.Linear(14, 9))


@VISION.add("a spatial transformer by affine_grid and grid_sample", image)
def spatial_transformer():
    def forward(net, x):
        x = F.relu(net.first(x))
        pose = net.pose(F.relu(net.locate(x)).mean((2, 3))).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(pose, list(x.shape), align_corners=False), align_corners=False)
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    parts = {"first": conv(3, 10), "locate": conv(10, 11), "pose": nn.Linear(11, 6), "last": conv(10, 14)}
    return Net(forward, head=nn.Linear(14, 9), **parts)


@VISION.add("interpolation of several kinds", image)
def interpolation():
    def forward(net, x):
        x = F.interpolate(F.relu(net.first(x)), scale_factor=2)
        x = F.interpolate(F.relu(net.middle(x)), size=(7, 5), mode="bilinear", align_corners=False)
        return net.head(F.interpolate(F.relu(net.last(x)), (4, 9), mode="bicubic"))

    return Net(forward, first=conv(3, 10), middle=conv(10, 12), last=conv(12, 14), head=conv(14, 5))


@VISION.add("pooling of several kinds", image)
def pooling():
    def forward(net, x):
        x = F.max_pool2d(F.relu(net.first(x)), 3, 1, 1)
        x = F.avg_pool2d(F.relu(net.middle(x)), 2) + F.adaptive_max_pool2d(x, (4, 3)).repeat(1, 1, 1, 1)
        x = torch.cat([F.adaptive_avg_pool2d(x, (2, 1)), F.lp_pool2d(F.relu(x), 2, (2, 3))], dim=1)
        return net.head(F.relu(net.hidden(x.flatten(1))))

    return Net(forward, first=conv(3, 10), middle=conv(10, 10), hidden=nn.Linear(40, 14), head=nn.Linear(14, 9))


@VISION.add("max pooling undone by its indices", image)
def max_unpool():
    def forward(net, x):
        x, where = F.max_pool2d(F.relu(net.first(x)), 2, return_indices=True)
        x = F.max_unpool2d(x, where, 2)
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    return Net(forward, first=conv(3, 10), last=conv(10, 14), head=nn.Linear(14, 9))


@VISION.add("UNet with joined skips", image)
def unet():
    def forward(net, x):
        a = F.relu(net.down_a(x))
        b = F.relu(net.down_b(F.max_pool2d(a, 2)))
        c = F.relu(net.middle(F.max_pool2d(b, 2, ceil_mode=True)))
        b = F.relu(net.join_b(torch.cat([net.up_b(c)[:, :, : b.shape[2], : b.shape[3]], b], dim=1)))
        a = F.relu(net.join_a(torch.cat([net.up_a(b), a], dim=1)))
        return net.head(a)

    downs = {"down_a": conv(3, 10), "down_b": conv(10, 12), "middle": conv(12, 14)}
    ups = {"up_b": nn.ConvTranspose2d(14, 11, 2, 2), "up_a": nn.ConvTranspose2d(13, 5, 2, 2)}
    return Net(forward, join_b=conv(23, 13), join_a=conv(15, 15), head=conv(15, 4, 1), **downs, **ups)


@VISION.add("UNet whose skips are cropped to unpadded convolutions", image)
def unet_cropped():
    def forward(net, x):
        a = F.relu(net.first(x))
        b = F.relu(net.second(a))
        crop = a[:, :, 1:-1, 1:-1]
        return net.head(F.relu(net.last(torch.cat([b, crop], dim=1))))

    convs = {"first": conv(3, 10), "second": nn.Conv2d(10, 12, 3), "last": conv(22, 14)}
    return Net(forward, head=conv(14, 5, 1), **convs)


@VISION.add("places compared between two images (correlation volume)", image)
def correlation():
    def forward(net, x):
        a, b = (F.relu(net.first(y)) for y in (x, x.flip(3)))
        volume = torch.einsum("bchw,bcw->bhw", a, b.mean(2)) * net.scale
        return net.head(F.relu(net.hidden(volume.flatten(1))))

    return Net(forward, first=conv(3, 10), scale=0.3, hidden=nn.Linear(48, 14), head=nn.Linear(14, 9))


@VISION.add("correlation divided by the root of the number of channels", image)
def correlation_scaled():
    def forward(net, x):
        a, b = (F.relu(net.first(y)) for y in (x, x.flip(3)))
        volume = torch.einsum("bchw,bcw->bhw", a, b.mean(2)) / torch.sqrt(torch.tensor(a.shape[1]).float())
        return net.head(F.relu(net.hidden(volume.flatten(1))))

    return Net(forward, first=conv(3, 10), hidden=nn.Linear(48, 14), head=nn.Linear(14, 9))


@VISION.add("learned upsampling: each place a softmax over nine neighbours", image)
def convex_upsampling():
    def forward(net, x):
        x = F.relu(net.first(x))
        flow = net.flow(x)
        mask = net.mask(F.relu(net.hidden(x))).unflatten(1, (1, 9, 2, 2)).softmax(2)
        neighbours = F.unfold(flow, 3, padding=1).view(2, 2, 9, 1, 1, *x.shape[2:])
        up = (mask.permute(0, 1, 2, 3, 4, 5, 6) * neighbours).sum(2)
        return up.permute(0, 1, 4, 2, 5, 3).reshape(2, 2, 16, 12)

    convs = {"first": conv(3, 10), "flow": conv(10, 2), "hidden": conv(10, 14), "mask": conv(14, 36, 1)}
    return Net(forward, **convs)
