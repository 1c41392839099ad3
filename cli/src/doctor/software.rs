//! What the software platform offers.

use kvm_ops::{Error, Irqchip, Kind, Missing, Tech};

use crate::hosts;

use super::Offer;

/// Creates a VM of the technology on the platform of its vendor.
pub(super) fn offer(tech: Tech) -> Offer {
    let platforms = hosts::platforms();
    if platforms.is_empty() {
        let mut offer = Offer::no("not in this build", "this build has no software platform");
        offer
            .what_to_do
            .push("build it with the cargo feature `sim`".into());
        return offer;
    }
    match platforms
        .iter()
        .find(|place| place.host.vendor() == tech.vendor())
    {
        Some(place) => created(
            tech,
            place.host.try_create(Kind::Of(tech), 1, Irqchip::None),
        ),
        None => created(tech, Err(Error::Unsupported(Missing::Feature(tech)))),
    }
}

/// What came of creating a VM through the library.
pub(super) fn created(tech: Tech, result: kvm_ops::Result<()>) -> Offer {
    let error = match result {
        Ok(()) => return Offer::yes(),
        Err(error) => error,
    };
    let Error::Unsupported(missing) = error else {
        return Offer::no("no", error.to_string());
    };
    let why = missing.to_string();
    match missing {
        Missing::Feature(_) => {
            let mut offer = Offer::no("not in this build", why);
            let feature = if tech.is_confidential() && tech.vendor() == kvm_ops::Vendor::Amd {
                "sev"
            } else {
                tech.name()
            };
            offer
                .what_to_do
                .push(format!("build it with the cargo feature `{feature}`"));
            offer
        }
        _ => Offer::no("no", why),
    }
}
