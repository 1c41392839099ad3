//! Commands of the platform, without a guest.

use super::super::asid::GuestId;
use super::super::{Firmware, Outcome, check_length, view};
use crate::command::{Command, Init, InitEx, InitFlags, PlatformFlags, PlatformStatus};
use crate::status::Status;

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
            INIT => self.init(view(buffer)?, None),
            INIT_EX => self.init_ex(view(buffer)?),
            SHUTDOWN => self.shutdown(),
            FACTORY_RESET => self.factory_reset(),
            PLATFORM_STATUS => self.platform_status(view(buffer)?),
            DF_FLUSH => self.df_flush(),
            NOP => Ok(()),
            PEK_GEN => self.pek_gen(),
            PDH_GEN => self.pdh_gen(),
            PEK_CSR => self.pek_csr(view(buffer)?),
            PEK_CERT_IMPORT => self.pek_cert_import(view(buffer)?),
            PDH_CERT_EXPORT => self.pdh_cert_export(view(buffer)?),
            GET_ID => self.get_id(view(buffer)?),
            LAUNCH_START => self.launch_start(view(buffer)?),
            RECEIVE_START => self.receive_start(view(buffer)?),
            _ => Err(Status::INVALID_COMMAND),
        }
    }

    fn init_ex(&mut self, buffer: &InitEx) -> Outcome {
        check_length(buffer.length)?;
        let init = Init {
            options: buffer.options,
            tmr_paddr: buffer.tmr_paddr,
            tmr_length: buffer.tmr_length,
            ..Init::default()
        };
        let nv = (buffer.nv_paddr.get(), buffer.nv_length.get());
        self.init(&init, Some(nv).filter(|nv| *nv != (0, 0)))
    }

    fn init(&mut self, buffer: &Init, nv: Option<(u64, u32)>) -> Outcome {
        if buffer.options.reserved() != 0 {
            return Err(Status::INVALID_PARAM);
        }
        let es = buffer.options.contains(InitFlags::SEV_ES);
        if es {
            let len = if self.sp.snp.is_some() {
                TMR_LEN_SNP
            } else {
                TMR_LEN
            };
            let tmr_len = u64::from(buffer.tmr_length);
            if tmr_len < len {
                return Err(Status::INVALID_LEN);
            }
            if self.writable(buffer.tmr_paddr.get(), tmr_len)? % len != 0 {
                return Err(Status::INVALID_ADDRESS);
            }
        }
        if let Some((address, len)) = nv {
            self.load_nv(address, len)?;
        } else {
            self.sp.nv_address = None;
        }
        self.sp.initialised = true;
        self.sp.es = es;
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

    fn platform_status(&mut self, buffer: &mut PlatformStatus) -> Outcome {
        let (api_major, api_minor, build) = self.machine.config.api;
        let mut flags = PlatformFlags::default();
        if self.sp.identity.keys().owner.is_some() {
            flags = flags | PlatformFlags::OWNER;
        }
        if self.sp.es {
            flags = flags | PlatformFlags::CONFIG_ES;
        }
        *buffer = PlatformStatus {
            api_major,
            api_minor,
            state: self.sp.platform_state() as u8,
            flags,
            build,
            guest_count: (self.sp.guests.len() as u32).into(),
        };
        Ok(())
    }
}
