//! Bytes as a sequence of operations. Nothing may panic, and the books must balance at the end.
#![no_main]

use libfuzzer_sys::fuzz_target;
use soft_amd_sp::{Command, GuestPage, PageSize, PageState, Platform, RmpAdjust, RmpUpdate};

/// Takes values off the input; zeros after its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().map_or((0, self.0), |(f, r)| (*f, r));
        self.0 = rest;
        first
    }

    /// Few distinct addresses, so that operations meet.
    fn address(&mut self) -> u64 {
        let byte = u64::from(self.byte());
        match byte >> 6 {
            0 | 1 => byte << 12,
            2 => (byte & 3) << 21,
            _ => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }

    fn size(&mut self) -> PageSize {
        if self.byte() & 1 == 0 {
            PageSize::Size4K
        } else {
            PageSize::Size2M
        }
    }

    fn page(&mut self) -> GuestPage {
        let page = GuestPage::new(self.byte().into(), self.address(), self.address());
        page.vmpl(self.byte()).mapping(self.size())
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(p) = Platform::builder()
        .memory(8 << 20)
        .cores(1)
        .asids(6, 12)
        .seed(1)
        .build()
    else {
        return;
    };
    let mut input = Input(data);
    if input.byte() & 1 == 0 {
        p.enable_snp_all();
    }
    while !input.0.is_empty() {
        match input.byte() % 16 {
            0..=6 => {
                let command = Command::ALL[usize::from(input.byte()) % Command::ALL.len()];
                let mut buffer = vec![0; command.buffer_len()];
                for field in command.fields() {
                    let value = match field.len {
                        8 => input.address(),
                        _ => input.byte().into(),
                    };
                    let bytes = value.to_le_bytes();
                    let n = field.len.min(8);
                    buffer[field.offset..field.offset + n].copy_from_slice(&bytes[..n]);
                }
                p.command(command, &mut buffer);
            }
            7 => {
                p.mailbox(u32::from(input.byte()), input.address());
            }
            8 => {
                let mut buffer: [u8; 0x44] = std::array::from_fn(|_| input.byte());
                p.command(u32::from(input.byte()), &mut buffer);
            }
            9 | 10 => {
                let flags = input.byte();
                let update = RmpUpdate {
                    gpa: input.address(),
                    assigned: flags & 1 != 0,
                    size: input.size(),
                    immutable: flags & 2 != 0,
                    asid: u32::from(flags >> 4),
                };
                let _ = p.rmpupdate(input.address(), &update);
            }
            11 => {
                let _ = p.psmash(input.address());
            }
            12 => {
                let _ = p.pvalidate(&input.page(), input.size(), input.byte() & 1 == 0);
            }
            13 => {
                let adjust = RmpAdjust {
                    target_vmpl: input.byte(),
                    permissions: input.byte(),
                    vmsa: input.byte() & 1 != 0,
                };
                let _ = p.rmpadjust(&input.page(), input.size(), &adjust);
            }
            14 => {
                let (at, page) = (input.address(), input.page());
                let _ = p.host_write(at, &[input.byte(); 48]);
                let _ = p.guest_write(&page, &[input.byte(); 24]);
                let _ = p.guest_write_shared(&page, &[1; 8]);
                let _ = p.guest_read(&page, &mut [0; 24]);
            }
            _ => p.wbinvd_all(),
        }
    }
    let s = p.snapshot();
    let _ = s.to_string();
    let contexts = s
        .pages_by_state()
        .get(&PageState::Context)
        .copied()
        .unwrap_or(0);
    assert_eq!(contexts, s.snp_guests.len());
    let active = s.guests.iter().filter(|g| g.asid.is_some()).count()
        + s.snp_guests.iter().filter(|g| g.asid.is_some()).count();
    let bound = |state: &soft_amd_sp::AsidState| match state {
        soft_amd_sp::AsidState::Bound(guests) => guests.len(),
        _ => 0,
    };
    assert_eq!(active, s.asids.iter().map(|(_, s)| bound(s)).sum::<usize>());
});
