//! The offer of the software platform.

use kvm_ops::{Error, Irqchip, Kind, Missing, Tech};

use crate::hosts;

use super::Offer;

/// Creates a VM of the technology on the platform of its vendor.
pub(super) fn offer(tech: Tech) -> Offer {
    match hosts::platforms(false)
        .iter()
        .find(|place| Some(place.host.vendor()) == tech.vendor())
    {
        Some(place) => created(place.host.try_create(Kind::Of(tech), 1, Irqchip::None)),
        None => created(Err(Error::unsupported(Missing::HostTech, tech))),
    }
}

/// The offer that follows from an attempt to create a VM through the library.
pub(super) fn created(result: kvm_ops::Result<()>) -> Offer {
    match result {
        Ok(()) => Offer::yes(),
        Err(error) => Offer::no("no", error.to_string()),
    }
}
