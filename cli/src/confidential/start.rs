//! The measured start of a confidential VM on the software platform, for every technology.

use std::ops::Range;
use std::sync::Arc;

use kvm_ops::Tech;
use kvm_ops::guest::GuestProgram;
use kvm_ops_machine::{LaunchStep, MachineConfig, Payload};
use serde::Serialize;
use soft_amd_sp::Platform;

use super::TdImage;
use super::guest::{GuestMemory, InConfidence};
use super::sev::SevOwner;
use crate::hosts::{AnyMachine, Place};

/// The end address of firmware.
const FOUR_GIB: u64 = 1 << 32;

/// The measured start of a confidential VM.
pub(crate) struct Start {
    steps: Vec<LaunchStep>,
    /// The digest of these pages, computed without the firmware.
    off_line: Vec<u8>,
    /// The owner who authenticates an SEV guest's digest.
    owner: Option<SevOwner>,
}

/// The digest that the firmware measured, and the expected one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Measurement {
    /// The firmware's digest; `None` if it is not readable.
    firmware: Option<String>,
    /// The digest computed from the start alone.
    off_line: String,
    /// The reason why the two differ.
    #[serde(skip)]
    why: Option<String>,
}

impl Measurement {
    /// Returns the digest if it equals the one computed off line.
    ///
    /// # Errors
    /// A sentence that says how they differ.
    pub(crate) fn checked(&self) -> Result<&str, String> {
        match (&self.why, &self.firmware) {
            (Some(why), _) => Err(why.clone()),
            (None, Some(digest)) if *digest == self.off_line => Ok(digest),
            (None, digest) => Err(format!(
                "the firmware measured {}, off line it is {}",
                digest.as_deref().unwrap_or("nothing"),
                self.off_line
            )),
        }
    }
}

impl Start {
    /// The start of a TD.
    pub(crate) fn of_td(image: &TdImage) -> Self {
        Self {
            steps: image.steps().to_vec(),
            off_line: image.mrtd().to_vec(),
            owner: None,
        }
    }

    /// The start of an SEV guest with this many vCPUs.
    fn of_sev(tech: Tech, vcpus: u32, place: &Place) -> Option<Self> {
        let platform = place.platform.as_ref()?.sev_platform()?;
        let pages = super::sev::pages();
        let owner = SevOwner::new(tech, &pages, vcpus, platform)?;
        Some(Self {
            steps: pages.into_iter().map(LaunchStep::from).collect(),
            off_line: owner.digest(),
            owner: Some(owner),
        })
    }

    /// The start of a SEV guest that must have this digest; `None` if the AMD SP does not answer.
    pub(crate) fn of_sev_firmware(
        tech: Tech,
        digest: Vec<u8>,
        platform: &Platform,
    ) -> Option<Self> {
        let owner = SevOwner::expecting(tech, digest, platform)?;
        Some(Self {
            steps: Vec::new(),
            off_line: owner.digest(),
            owner: Some(owner),
        })
    }

    /// The parameters of a guest with an owner.
    pub(crate) fn params(&self) -> Option<kvm_ops::EncParams> {
        let owner = self.owner.as_ref()?;
        Some(kvm_ops::EncParams::Sev(Box::new(owner.params())))
    }

    /// The built-in start of a technology; `None` for a technology without one, and on a real host.
    pub(crate) fn built_in(tech: Tech, vcpus: u32, place: &Place) -> Option<Self> {
        match tech {
            _ if !place.is_platform() => None,
            Tech::Tdx => Some(Self::of_td(&TdImage::built_in(
                kvm_ops_tdvf::Order::SinglePass,
            ))),
            Tech::Sev | Tech::SevEs | Tech::SevSnp => Self::of_sev(tech, vcpus, place),
            _ => None,
        }
    }

    /// The addresses of the pages.
    fn added(&self) -> impl Iterator<Item = u64> + '_ {
        self.steps.iter().filter_map(|step| match step {
            LaunchStep::Add(page) => Some(page.gpa.get()),
            _ => None,
        })
    }

    /// The memory ranges of a VM with this start and `ram` bytes of RAM: the RAM, and the range
    /// that ends at 4 GiB.
    fn memory(&self, ram: u64) -> Vec<Range<u64>> {
        let high = self.added().filter(|gpa| *gpa >= ram && *gpa < FOUR_GIB);
        let top = high.min().map(|lowest| lowest..FOUR_GIB);
        std::iter::once(0..ram).chain(top).collect()
    }

    /// Adds the start, and the programs that it runs, to a machine.
    pub(crate) fn configure(
        &self,
        config: MachineConfig,
        ram: u64,
        programs: Vec<Box<dyn GuestProgram>>,
    ) -> MachineConfig {
        let memory = Arc::new(GuestMemory::new(self.memory(ram), self.added()));
        let in_confidence = |program| -> Box<dyn GuestProgram> {
            Box::new(InConfidence::new(program, Arc::clone(&memory)))
        };
        let programs = programs.into_iter().map(in_confidence).collect();
        let config = config
            .payload(Payload::Programs(programs))
            .launch(self.steps.clone());
        match self.params() {
            Some(params) => config.enc(params),
            None => config,
        }
    }

    /// Asks the firmware for the measurement of a machine that was built with this start.
    pub(crate) fn measurement(&self, place: &Place, machine: &dyn AnyMachine) -> Measurement {
        let told = self.ask(place, machine);
        Measurement {
            firmware: told.as_ref().ok().map(hex::encode),
            off_line: hex::encode(&self.off_line),
            why: told.err(),
        }
    }

    fn ask(&self, place: &Place, machine: &dyn AnyMachine) -> Result<Vec<u8>, String> {
        let measurement = machine
            .measurement()
            .map_err(|error| format!("the firmware does not tell the measurement: {error}"))?;
        let Some(owner) = &self.owner else {
            return Ok(measurement.bytes().to_vec());
        };
        let platform = place.platform.as_ref().and_then(|host| host.sev_platform());
        let platform = platform.ok_or("the host has no AMD SP")?;
        owner.check(&measurement, machine.gctx(), platform)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_digest_off_line_passes() {
        let measurement = |firmware: Option<&str>, why: Option<&str>| Measurement {
            firmware: firmware.map(Into::into),
            off_line: "ab".into(),
            why: why.map(Into::into),
        };
        assert_eq!(measurement(Some("ab"), None).checked(), Ok("ab"));
        let other = measurement(Some("cd"), None).checked().unwrap_err();
        assert!(other.contains("cd") && other.contains("ab"), "{other}");
        assert!(measurement(None, None).checked().is_err());
        assert_eq!(
            measurement(None, Some("gone")).checked(),
            Err("gone".into())
        );
    }
}
