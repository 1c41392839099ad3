//! SEV-SNP.

mod carry;
mod cpuid;
mod debug;
mod launch;
mod pages;
mod platform;
mod request;
mod swap;

use super::asid::{AsidKind, GuestId};
use super::rules::SnpState;
use super::{Firmware, Outcome, check_length, view};
use crate::builder::TcbVersion;
use crate::cipher::MemoryKey;
use crate::command::{
    Command, PageAddress, SnpActivate, SnpActivateEx, SnpGuestStatus, SnpGuestStatusPage,
    SnpPolicy, U64,
};
use crate::machine::entry::{PageSize, PageState, RmpEntry};
use crate::measure::SnpDigest;
use crate::status::Status;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Context of an SNP guest.
pub(crate) struct SnpGuest {
    pub(crate) state: SnpState,
    pub(crate) policy: SnpPolicy,
    pub(crate) asid: Option<u32>,
    pub(crate) digest: SnpDigest,
    pub(crate) report_id: [u8; 32],
    key: Arc<MemoryKey>,
    launch: Launch,
    /// Message keys of VMPL0 to VMPL3, and the last sequence number used with each.
    vmpck: [[u8; 32]; 4],
    sequence: [u64; 4],
    identity: GuestIdentity,
    swap: swap::Swap,
    /// The root of derived keys that go with the guest, if its migration agent gave it one.
    vmrk: Option<[u8; 32]>,
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
            SNP_ACTIVATE => self.snp_activate(context, view::<SnpActivate>(buffer)?.asid.get()),
            SNP_ACTIVATE_EX => {
                let buffer: &mut SnpActivateEx = view(buffer)?;
                check_length(buffer.ex_len)?;
                self.check_core_list(buffer.numids.get(), buffer.id_paddr.get())?;
                self.snp_activate(context, buffer.asid.get())
            }
            SNP_GUEST_STATUS => {
                let buffer: &mut SnpGuestStatus = view(buffer)?;
                self.snp_guest_status(context, buffer.status_paddr)
            }
            SNP_GUEST_REQUEST => self.guest_request(context, view(buffer)?),
            SNP_LAUNCH_START => self.snp_launch_start(context, view(buffer)?),
            SNP_LAUNCH_UPDATE => self.snp_launch_update(context, view(buffer)?),
            SNP_LAUNCH_FINISH => self.snp_launch_finish(context, view(buffer)?),
            SNP_DBG_DECRYPT => self.snp_dbg_decrypt(context, view(buffer)?),
            SNP_DBG_ENCRYPT => self.snp_dbg_encrypt(context, view(buffer)?),
            SNP_PAGE_MOVE => self.page_move(context, view(buffer)?),
            SNP_PAGE_SWAP_OUT => self.page_swap_out(context, view(buffer)?),
            SNP_PAGE_SWAP_IN => self.page_swap_in(context, view(buffer)?),
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

    fn gctx_create(&mut self, address: PageAddress) -> Outcome {
        let address = self.small_page(address)?;
        if self.guest_count() >= self.sp.max_guests {
            return Err(Status::RESOURCE_LIMIT);
        }
        let guest = SnpGuest {
            state: SnpState::Init,
            policy: SnpPolicy::default(),
            asid: None,
            digest: SnpDigest::new(),
            report_id: self.sp.random(),
            key: Arc::new(MemoryKey::new(&self.sp.random())),
            launch: Launch::default(),
            vmpck: std::array::from_fn(|_| self.sp.random()),
            sequence: [0; 4],
            identity: GuestIdentity::default(),
            swap: swap::Swap::default(),
            vmrk: None,
        };
        // The host sees the context as cipher text of the firmware's key, which random bytes
        // represent.
        let mut noise = Box::new([0; 0x1000]);
        rand_core::RngCore::fill_bytes(&mut self.sp.rng, &mut noise[..]);
        self.with_entry(address, |entry| {
            expect_small(entry, PageState::Firmware)?;
            Ok(RmpEntry::of(PageState::Context))
        })?;
        let place = self.place(address)?;
        place.lock().write(place.index, 0, &noise[..]);
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

    fn snp_guest_status(&self, context: u64, address: U64) -> Outcome {
        let guest = self.snp_guest(context)?;
        let out = SnpGuestStatusPage {
            policy: guest.policy,
            asid: guest.asid.unwrap_or(0).into(),
            state: guest.state as u8,
            ..Default::default()
        };
        self.write(address.get(), out.as_bytes())
    }

    /// The address of a 4 KiB page in memory.
    fn small_page(&self, address: PageAddress) -> Outcome<u64> {
        self.aligned_page(address.get(), PageSize::Size4K)
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
        let place = self.place(address)?;
        let mut region = place.lock_all();
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
