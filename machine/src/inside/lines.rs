//! Interrupt lines where no interrupt controller is in the platform: each sends a message when it rises.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use kvm_ops::{Error, Field, Msi, Result};

/// The lines that have a message.
#[derive(Default)]
pub(crate) struct Lines(Mutex<BTreeMap<u32, Line>>);

struct Line {
    msi: Msi,
    active: bool,
}

impl Lines {
    fn with<T>(&self, f: impl FnOnce(&mut BTreeMap<u32, Line>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sets the message of a line. Its level stays.
    pub(crate) fn set_route(&self, gsi: u32, msi: Msi) {
        self.with(|lines| {
            let line = lines.entry(gsi).or_insert(Line { msi, active: false });
            line.msi = msi;
        });
    }

    /// Sets the level of a line. Returns the message to send, if the line rose.
    pub(crate) fn set(&self, gsi: u32, active: bool) -> Result<Option<Msi>> {
        self.with(|lines| {
            let line = lines.get_mut(&gsi);
            let line = line.ok_or(Error::NotFound(Field::Gsi, gsi.into()))?;
            let rose = active && !line.active;
            line.active = active;
            Ok(rose.then_some(line.msi))
        })
    }

    /// The message of a line.
    pub(crate) fn route(&self, gsi: u32) -> Result<Msi> {
        self.with(|lines| lines.get(&gsi).map(|line| line.msi))
            .ok_or(Error::NotFound(Field::Gsi, gsi.into()))
    }
}

#[cfg(test)]
mod tests {
    use kvm_ops::VcpuId;

    use super::*;

    #[test]
    fn a_line_sends_its_message_when_it_rises_and_only_then() {
        let lines = Lines::default();
        assert_eq!(lines.set(5, true), Err(Error::NotFound(Field::Gsi, 5)));
        let (first, second) = (Msi::to(VcpuId(0), 0x30), Msi::to(VcpuId(1), 0x31));
        lines.set_route(5, first);
        let levels = [true, true, false, false, true];
        let sent = levels.map(|level| lines.set(5, level).unwrap());
        assert_eq!(sent, [Some(first), None, None, None, Some(first)]);
        lines.set_route(5, second);
        assert_eq!(lines.set(5, true), Ok(None), "still active");
        assert_eq!(lines.route(5), Ok(second));
    }
}
