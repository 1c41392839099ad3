//! Ports and devices by the GHCB page.

use kvm_ops::{Exit, Gpa, Result};
use kvm_ops_cpu::{Exit as CpuExit, PortAccess};

use super::page::RAX;
use super::{Malformed, Pending, take_data};
use crate::processor::{Access, Next, Processor};

/// Bits of EXITINFO1 of a port access (APM vol. 2, 15.10.2).
const INPUT: u64 = 1 << 0;
const STRING: u64 = 1 << 2;
const REPEAT: u64 = 1 << 3;

const OFFSET: u64 = 0xfff;

impl Processor {
    pub(super) fn port_request(&mut self, exit: CpuExit, info1: u64, info2: u64) -> Result<Next> {
        let (port, input) = ((info1 >> 16) as u16, info1 & INPUT != 0);
        let size = match info1 >> 4 & 7 {
            size @ (1 | 2 | 4) => size as u8,
            _ => return self.malformed(exit, Malformed::Input),
        };
        if info1 & STRING != 0 {
            let count = if info1 & REPEAT != 0 { info2 } else { 1 };
            return self.string_request(exit, port, size, count, input);
        }
        let rax = self.ghcb()?.get(RAX);
        let Some(value) = rax.or(input.then_some(0)) else {
            return self.malformed(exit, Malformed::Missing);
        };
        let io = PortAccess {
            port,
            size,
            input,
            string: false,
            repeat: false,
            immediate: false,
            address_size: 8,
            segment: 0,
            value: value as u32,
        };
        if let Some(value) = self.chip_port(&io) {
            let ghcb = self.ghcb()?;
            if input {
                take_data(ghcb, None, &value.to_le_bytes());
            }
            return self.took(exit, 0);
        }
        let len = usize::from(size);
        let count = 1;
        if input {
            let pending = Pending::Data {
                exit,
                at: None,
                len,
            };
            let leave = Exit::IoIn { port, size, count };
            return self.wait_for(pending, leave, vec![0; len]);
        }
        let data = value.to_le_bytes()[..len].to_vec();
        let leave = Exit::IoOut { port, size, count };
        self.wait_for(Pending::Done(exit), leave, data)
    }

    /// INS and OUTS, whose data is in the page's buffer.
    fn string_request(
        &mut self,
        exit: CpuExit,
        port: u16,
        size: u8,
        count: u64,
        input: bool,
    ) -> Result<Next> {
        let ghcb = self.ghcb()?;
        let len = usize::try_from(count).ok();
        let len = len.and_then(|count| count.checked_mul(size.into()));
        let place = len.and_then(|len| ghcb.scratch(len));
        let Some(place) = place.filter(|place| !place.is_empty()) else {
            return self.malformed(exit, Malformed::Scratch);
        };
        let count = count as u32;
        if input {
            let (at, len) = (Some(place.start), place.len());
            let leave = Exit::IoIn { port, size, count };
            return self.wait_for(Pending::Data { exit, at, len }, leave, vec![0; len]);
        }
        let data = ghcb.bytes(place).to_vec();
        let leave = Exit::IoOut { port, size, count };
        self.wait_for(Pending::Done(exit), leave, data)
    }

    /// Reads or writes up to 8 bytes of a device.
    pub(super) fn device_request(
        &mut self,
        exit: CpuExit,
        gpa: u64,
        len: u64,
        write: bool,
    ) -> Result<Next> {
        let inside = (1..=8).contains(&len) && (gpa & OFFSET) + len <= OFFSET + 1;
        if !inside {
            return self.malformed(exit, Malformed::Input);
        }
        let ghcb = self.ghcb()?;
        let Some(place) = ghcb.scratch(len as usize) else {
            return self.malformed(exit, Malformed::Scratch);
        };
        let mut access = Access::new(gpa, ghcb.bytes(place.clone()), write);
        if self.own_device(&mut access) {
            if !write {
                let ghcb = self.ghcb()?;
                take_data(ghcb, Some(place.start), &access.data[..len as usize]);
            }
            return self.took(exit, 0);
        }
        let (gpa, at, len) = (Gpa::new(gpa), Some(place.start), place.len());
        if write {
            let data = access.data[..len].to_vec();
            let leave = Exit::MmioWrite {
                gpa,
                len: len as u8,
            };
            return self.wait_for(Pending::Done(exit), leave, data);
        }
        let leave = Exit::MmioRead {
            gpa,
            len: len as u8,
        };
        self.wait_for(Pending::Data { exit, at, len }, leave, vec![0; len])
    }
}
