//! SEV-SNP.

mod cpuid;
mod debug;
mod launch;
mod pages;
mod platform;
mod request;

use super::asid::{AsidKind, GuestId};
use super::rules::SnpState;
use super::{Firmware, Outcome};
use crate::builder::TcbVersion;
use crate::cipher::MemoryKey;
use crate::command::Command;
use crate::machine::entry::{PageSize, PageState, RmpEntry};
use crate::measure::SnpDigest;
use crate::status::Status;
use crate::wire::{u32_at, u64_at};
use std::sync::Arc;

/// Bits of the policy of an SNP guest.
pub mod snp_policy {
    /// SMT may be on.
    pub const SMT: u64 = 1 << 16;
    /// Must be 1.
    pub const RESERVED_ONE: u64 = 1 << 17;
    /// A migration agent may be associated.
    pub const MIGRATE_MA: u64 = 1 << 18;
    /// Debugging is allowed.
    pub const DEBUG: u64 = 1 << 19;
    /// The guest may run on one socket only.
    pub const SINGLE_SOCKET: u64 = 1 << 20;
    /// CXL memory may be used.
    pub const CXL_ALLOW: u64 = 1 << 21;
    /// Memory must be encrypted with AES-256-XTS.
    pub const MEM_AES_256_XTS: u64 = 1 << 22;
    /// RAPL must be disabled.
    pub const RAPL_DIS: u64 = 1 << 23;
    /// Ciphertext hiding must be on.
    pub const CIPHERTEXT_HIDING_DRAM: u64 = 1 << 24;
    /// Pages may not be swapped or moved.
    pub const PAGE_SWAP_DISABLE: u64 = 1 << 25;
    /// Every bit with a meaning.
    pub const DEFINED: u64 = (1 << 26) - 1;
}

/// Context of an SNP guest.
pub(crate) struct SnpGuest {
    pub(crate) state: SnpState,
    pub(crate) policy: u64,
    pub(crate) asid: Option<u32>,
    pub(crate) digest: SnpDigest,
    pub(crate) report_id: [u8; 32],
    key: Arc<MemoryKey>,
    launch: Launch,
    /// Message keys of VMPL0 to VMPL3, and the last sequence number used with each.
    vmpck: [[u8; 32]; 4],
    sequence: [u64; 4],
    identity: GuestIdentity,
}

/// Parameters of SNP_LAUNCH_START.
#[derive(Default)]
struct Launch {
    imi: bool,
    /// Report identity of the migration agent.
    migration_agent: Option<[u8; 32]>,
    desired_tsc_khz: u32,
    gosvw: [u8; 16],
    secure_tsc: bool,
    tcb: TcbVersion,
}

/// Identity that SNP_LAUNCH_FINISH fixed.
#[derive(Default)]
struct GuestIdentity {
    block: Option<crate::measure::IdBlock>,
    id_key_digest: Option<[u8; 48]>,
    author_key_digest: Option<[u8; 48]>,
    host_data: [u8; 32],
    vcek_disabled: bool,
}

impl Firmware<'_> {
    /// A command of a guest that exists and whose state allows it.
    pub(super) fn snp_guest_command(
        &mut self,
        command: Command,
        context: u64,
        buffer: &mut [u8],
    ) -> Outcome {
        use Command::*;
        match command {
            SNP_DECOMMISSION => self.snp_decommission(context),
            SNP_ACTIVATE => self.snp_activate(context, u32_at(buffer, 8)),
            SNP_ACTIVATE_EX => {
                if u32_at(buffer, 0) as usize != SNP_ACTIVATE_EX.buffer_len() {
                    return Err(Status::INVALID_LEN);
                }
                self.check_core_list(u32_at(buffer, 0x14), u64_at(buffer, 0x18))?;
                self.snp_activate(context, u32_at(buffer, 0x10))
            }
            SNP_GUEST_STATUS => self.snp_guest_status(context, u64_at(buffer, 8)),
            SNP_GUEST_REQUEST => {
                self.guest_request(context, u64_at(buffer, 8), u64_at(buffer, 0x10))
            }
            SNP_LAUNCH_START => self.snp_launch_start(context, buffer),
            SNP_LAUNCH_UPDATE => self.snp_launch_update(context, buffer),
            SNP_LAUNCH_FINISH => self.snp_launch_finish(context, buffer),
            SNP_DBG_DECRYPT => self.snp_dbg_decrypt(context, buffer),
            SNP_DBG_ENCRYPT => self.snp_dbg_encrypt(context, buffer),
            SNP_PAGE_MOVE => self.page_move(context, buffer),
            _ => Err(Status::INVALID_COMMAND),
        }
    }

    fn snp_guest(&self, context: u64) -> Outcome<&SnpGuest> {
        self.sp.contexts.get(&context).ok_or(Status::INVALID_GUEST)
    }

    fn snp_guest_mut(&mut self, context: u64) -> Outcome<&mut SnpGuest> {
        self.sp
            .contexts
            .get_mut(&context)
            .ok_or(Status::INVALID_GUEST)
    }

    fn gctx_create(&mut self, address: u64) -> Outcome {
        let address = self.aligned_page(address, PageSize::Size4K)?;
        if self.guest_count() >= self.sp.max_guests {
            return Err(Status::RESOURCE_LIMIT);
        }
        let guest = SnpGuest {
            state: SnpState::Init,
            policy: 0,
            asid: None,
            digest: SnpDigest::new(),
            report_id: self.sp.random(),
            key: Arc::new(MemoryKey::new(&self.sp.random())),
            launch: Launch::default(),
            vmpck: std::array::from_fn(|_| self.sp.random()),
            sequence: [0; 4],
            identity: GuestIdentity::default(),
        };
        // The host sees the context as cipher text of the firmware's key, which random bytes
        // represent.
        let mut noise = Box::new([0; 0x1000]);
        rand_core::RngCore::fill_bytes(&mut self.sp.rng, &mut noise[..]);
        self.with_entry(address, |entry| {
            expect_small(entry, PageState::Firmware)?;
            Ok(RmpEntry::of(PageState::Context))
        })?;
        let place = self
            .machine
            .memory
            .place(address)
            .ok_or(Status::INVALID_ADDRESS)?;
        place.region.lock().write(place.index, 0, &noise[..]);
        self.sp.contexts.insert(address, guest);
        Ok(())
    }

    fn snp_decommission(&mut self, context: u64) -> Outcome {
        let asid = self.snp_guest(context)?.asid;
        self.release_asid(asid, GuestId::Context(context));
        self.sp.contexts.remove(&context);
        self.with_entry(context, |_| Ok(RmpEntry::of(PageState::Firmware)))
    }

    fn snp_activate(&mut self, context: u64, asid: u32) -> Outcome {
        let guest = self.snp_guest(context)?;
        let (current, key) = (guest.asid, Arc::clone(&guest.key));
        self.bind_asid(asid, AsidKind::Snp, GuestId::Context(context), current, key)?;
        self.snp_guest_mut(context)?.asid = Some(asid);
        Ok(())
    }

    fn snp_guest_status(&self, context: u64, address: u64) -> Outcome {
        let guest = self.snp_guest(context)?;
        let mut out = [0; 0x10];
        out[..8].copy_from_slice(&guest.policy.to_le_bytes());
        out[8..0xc].copy_from_slice(&guest.asid.unwrap_or(0).to_le_bytes());
        out[0xc] = guest.state as u8;
        self.write(address, &out)
    }

    /// The address of a page, aligned to its size.
    fn aligned_page(&self, address: u64, size: PageSize) -> Outcome<u64> {
        let address = self.range(address, size.bytes())?;
        if size.aligns(address) {
            Ok(address)
        } else {
            Err(Status::INVALID_ADDRESS)
        }
    }

    /// Looks at the entry of a page and replaces it, or leaves it on an error.
    fn with_entry(
        &self,
        address: u64,
        change: impl FnOnce(&RmpEntry) -> Outcome<RmpEntry>,
    ) -> Outcome {
        let place = self
            .machine
            .memory
            .place(address)
            .ok_or(Status::INVALID_ADDRESS)?;
        let mut region = place.region.lock();
        let new = change(&region.entry(place.index))?;
        // A large entry is replaced as a whole and keeps its base address.
        if region.is_large() {
            let base = region.entry(0);
            region.set_large(RmpEntry {
                gpa: base.gpa,
                ..new
            });
        } else {
            region.set_small(place.index, new);
        }
        Ok(())
    }
}

fn expect_small(entry: &RmpEntry, state: PageState) -> Outcome {
    if entry.state != state {
        Err(Status::INVALID_PAGE_STATE)
    } else if entry.size != PageSize::Size4K {
        Err(Status::INVALID_PAGE_SIZE)
    } else {
        Ok(())
    }
}
