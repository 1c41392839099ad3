//! Commands of the platform, without a guest.

use super::super::asid::GuestId;
use super::super::{Firmware, Outcome};
use crate::command::Command;
use crate::status::Status;
use crate::wire::{put, u32_at, u64_at};

/// INIT flag: make SEV-ES guests possible.
const FLAG_ES: u32 = 1;
/// Length of the trusted memory region that SEV-ES needs, without and with SNP.
const TMR_LEN: u64 = 1 << 20;
const TMR_LEN_SNP: u64 = 2 << 20;

impl Firmware<'_> {
    pub(in crate::firmware) fn platform_command(
        &mut self,
        command: Command,
        buffer: &mut [u8],
    ) -> Outcome {
        use Command::*;
        match command {
            INIT => self.init(
                u32_at(buffer, 0),
                u64_at(buffer, 8),
                u32_at(buffer, 0x10),
                None,
            ),
            INIT_EX => {
                if u32_at(buffer, 0) as usize != INIT_EX.buffer_len() {
                    return Err(Status::INVALID_LEN);
                }
                let nv = (u64_at(buffer, 0x18), u32_at(buffer, 0x20));
                let tmr = (u64_at(buffer, 8), u32_at(buffer, 0x10));
                self.init(u32_at(buffer, 4), tmr.0, tmr.1, Some(nv))
            }
            SHUTDOWN => self.shutdown(),
            FACTORY_RESET => self.factory_reset(),
            PLATFORM_STATUS => self.platform_status(buffer),
            DF_FLUSH => self.df_flush(),
            NOP => Ok(()),
            PEK_GEN => self.pek_gen(),
            PDH_GEN => self.pdh_gen(),
            PEK_CSR => self.pek_csr(buffer),
            PEK_CERT_IMPORT => self.pek_cert_import(buffer),
            PDH_CERT_EXPORT => self.pdh_cert_export(buffer),
            GET_ID => self.get_id(buffer),
            LAUNCH_START => self.launch_start(buffer),
            RECEIVE_START => self.receive_start(buffer),
            _ => Err(Status::INVALID_COMMAND),
        }
    }

    fn init(&mut self, flags: u32, tmr: u64, tmr_len: u32, nv: Option<(u64, u32)>) -> Outcome {
        if flags & !FLAG_ES != 0 {
            return Err(Status::INVALID_PARAM);
        }
        if flags & FLAG_ES != 0 {
            let len = if self.sp.snp.is_some() {
                TMR_LEN_SNP
            } else {
                TMR_LEN
            };
            if u64::from(tmr_len) < len {
                return Err(Status::INVALID_LEN);
            }
            if self.writable(tmr, tmr_len.into())? % len != 0 {
                return Err(Status::INVALID_ADDRESS);
            }
        }
        if let Some((address, len)) = nv.filter(|nv| *nv != (0, 0)) {
            self.load_nv(address, len)?;
        } else {
            self.sp.nv_address = None;
        }
        self.sp.initialised = true;
        self.sp.es = flags & FLAG_ES != 0;
        self.sp.asids.soil();
        self.machine.forget_wbinvd();
        Ok(())
    }

    fn shutdown(&mut self) -> Outcome {
        for (handle, guest) in std::mem::take(&mut self.sp.guests) {
            self.release_asid(guest.asid, GuestId::Handle(handle));
        }
        self.sp.initialised = false;
        self.sp.es = false;
        self.sp.nv_address = None;
        Ok(())
    }

    fn platform_status(&mut self, buffer: &mut [u8]) -> Outcome {
        let (major, minor, build) = self.machine.config.api;
        let owned = self.sp.identity.keys().owner.is_some();
        let flags = u32::from(owned) | u32::from(self.sp.es) << 8;
        put(buffer, 0, &[major, minor, self.sp.platform_state() as u8]);
        put(buffer, 3, &flags.to_le_bytes());
        put(buffer, 7, &[build]);
        put(buffer, 8, &(self.sp.guests.len() as u32).to_le_bytes());
        Ok(())
    }
}
