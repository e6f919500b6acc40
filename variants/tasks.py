"""Tasks that show what the variants are for: --env-id variants.tasks:DoorKey-v0, beside the scripts."""

import gymnasium
from gymnasium.spaces import Box
from gymnasium.wrappers import FilterObservation, TransformObservation


def cartpole_without_velocities(**kwargs):
    """The position of the cart and the angle of the pole: what moves how has to be remembered."""
    env = gymnasium.make("CartPole-v1", **kwargs)
    return TransformObservation(env, lambda obs: obs[[0, 2]], Box(-5, 5, (2,)))


def door_and_key(**kwargs):
    """MiniGrid-DoorKey-5x5: a picture of symbols and a direction, without the mission, which is a text."""
    import minigrid  # noqa: F401, registers its environments

    return FilterObservation(gymnasium.make("MiniGrid-DoorKey-5x5-v0", **kwargs), ["direction", "image"])


def room_from_pixels(**kwargs):
    """MiniGrid-Empty-Random-5x5: what the agent sees, as a picture of 56 x 56 pixels in colour."""
    import minigrid.wrappers

    env = gymnasium.make("MiniGrid-Empty-Random-5x5-v0", **kwargs)
    return minigrid.wrappers.ImgObsWrapper(minigrid.wrappers.RGBImgPartialObsWrapper(env))


def racing(**kwargs):
    """CarRacing with five actions in place of continuous ones."""
    return gymnasium.make("CarRacing-v3", continuous=False, **kwargs)


gymnasium.register("CartPoleWithoutVelocities-v0", entry_point=cartpole_without_velocities)
gymnasium.register("DoorKey-v0", entry_point=door_and_key)
gymnasium.register("Racing-v0", entry_point=racing)
gymnasium.register("RoomFromPixels-v0", entry_point=room_from_pixels)
