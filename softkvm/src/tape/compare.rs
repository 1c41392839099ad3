//! A call of the program beside the record's.

use kvm_ops_uapi::ioctl::KVM_RUN;
use kvm_ops_uapi::run::MMAP_SIZE;

use super::canon;
use super::format::{Call, Step, What, shown};
use super::places::Bases;
use super::play::{Inner, Played};
use super::record::page;
use crate::{Descriptor, Process, RunArea};

impl Inner {
    /// Compares a call with one of the record. Returns the addresses that it led to.
    pub(super) fn fits(
        &self,
        call: &Call,
        file: &Played,
        process: &dyn Process,
        (number, argument): (u32, u64),
    ) -> Result<Bases, String> {
        let made = What::ioctl(file.number, (number, argument));
        if call.what != made {
            return Err(format!("the program makes `{made}`"));
        }
        let mut bases = Bases::new(self.machine.vendor, number, argument);
        for step in &call.steps {
            match step {
                Step::Read(place, expected) => {
                    let Some(address) = bases.resolve(place) else {
                        return Err(format!("nothing leads to {place}"));
                    };
                    let mut bytes = vec![0; expected.len()];
                    if process.read(address, &mut bytes).is_err() {
                        return Err(format!("{place} cannot be read"));
                    }
                    bases.learn(place, &bytes);
                    let got = canon::read(&bases, place, &bytes, |fd| self.file_of(process, fd));
                    differ(&format!("{place}"), expected, &got)?;
                }
                Step::ReadFault(place, len) => {
                    let address = bases.resolve(place).unwrap_or(0);
                    // A record that was changed may ask for any length.
                    let mut bytes = vec![0; (*len).min(1 << 20)];
                    if process.read(address, &mut bytes).is_ok() {
                        return Err(format!("{place} can be read"));
                    }
                }
                _ => {}
            }
        }
        if number == KVM_RUN.number()
            && let Some(area) = file.run_area()
        {
            self.page_fits(call, file.number, area.as_ref())?;
        }
        Ok(bases)
    }

    /// Compares what the program wrote to the run page.
    fn page_fits(&self, call: &Call, file: u32, area: &dyn RunArea) -> Result<(), String> {
        let seen = self.lock().pages.get(&file).cloned();
        let mut expected = seen.unwrap_or_else(|| vec![0; MMAP_SIZE as usize]);
        for step in &call.steps {
            if let Step::PageIn(at, bytes) = step {
                let places = expected.iter_mut().skip(*at);
                for (to, from) in places.zip(bytes) {
                    *to = *from;
                }
            }
        }
        let got = page(area);
        let differs = expected.iter().zip(&got).position(|(a, b)| a != b);
        let Some(at) = differs else { return Ok(()) };
        let end = (at + 16).min(got.len());
        differ(
            &format!("run page at {at:#x}"),
            &expected[at..end],
            &got[at..end],
        )
    }

    /// The number of the file behind a descriptor.
    fn file_of(&self, process: &dyn Process, number: i32) -> u32 {
        match process.descriptor(number) {
            Descriptor::Closed => canon::CLOSED,
            Descriptor::Foreign => canon::FOREIGN,
            Descriptor::File(file) => file.as_played().map_or(canon::FOREIGN, |file| file.number),
        }
    }
}

/// Fails with the first difference.
fn differ(what: &str, expected: &[u8], got: &[u8]) -> Result<(), String> {
    let at = expected.iter().zip(got).position(|(a, b)| a != b);
    match at {
        None => Ok(()),
        Some(at) => Err(format!(
            "{what} differs from byte {at:#x} on: {} in the record, {} now",
            shown(&expected[at..]),
            shown(&got[at..])
        )),
    }
}
