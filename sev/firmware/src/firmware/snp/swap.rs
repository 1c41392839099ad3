//! Pages of a guest that leave memory and come back: SNP_PAGE_SWAP_OUT, SNP_PAGE_SWAP_IN and SNP_PAGE_MD_INIT.
//!
//! A page leaves encrypted under a key of the guest's context, and its record stays in a page that only the firmware
//! writes. The record counts once: a page that came back is not taken again, so an older one is worth nothing.
//! No open source describes this; `docs/inferred.md` has what is recalled and what is chosen.

use super::super::{Firmware, Outcome};
use super::expect_small;
use crate::command::{
    MdataEntry, MdataFlags, PageAddress, SizedPage, SnpPageSwapFlags, SnpPageSwapIn,
    SnpPageSwapOut, SnpPolicy, SwapType, U64, VmplPerms,
};
use crate::machine::entry::{PageSize, PageState, RmpEntry};
use crate::machine::region::PAGE;
use crate::status::Status;
use aes_gcm::aead::AeadInPlace;
use aes_gcm::{Aes256Gcm, KeyInit};
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

/// The part of a guest's context that swapping uses.
#[derive(Default)]
pub(super) struct Swap {
    /// Drawn when the first page leaves.
    key: Option<[u8; 32]>,
    /// Number of the last message.
    iv: u64,
    /// The record of the page of records that has no other place.
    root: MdataEntry,
}

impl Swap {
    pub(super) fn key(&self) -> Option<[u8; 32]> {
        self.key
    }

    pub(super) fn iv(&self) -> u64 {
        self.iv
    }

    pub(super) fn root(&self) -> MdataEntry {
        self.root
    }

    /// Takes over what came with a guest from another platform.
    pub(super) fn load(&mut self, key: [u8; 32], iv: u64, root: MdataEntry) {
        *self = Self {
            key: Some(key),
            iv,
            root,
        };
    }
}

/// The operands that both commands have.
struct Operands {
    kind: SwapType,
    size: PageSize,
    /// Where the record is; `None` for the context.
    record: Option<u64>,
    asid: u32,
    src: u64,
    dst: u64,
}

impl Firmware<'_> {
    pub(super) fn page_md_init(&mut self, page: SizedPage) -> Outcome {
        if page.size() != PageSize::Size4K {
            return Err(Status::INVALID_PAGE_SIZE);
        }
        let address = self.aligned_page(page.address(), PageSize::Size4K)?;
        self.write(address, &[0; PAGE])?;
        self.with_entry(address, |entry| {
            expect_small(entry, PageState::Firmware)?;
            Ok(RmpEntry::of(PageState::Metadata))
        })
    }

    fn swap_operands(
        &self,
        context: u64,
        flags: SnpPageSwapFlags,
        (src, dst, mdata): (PageAddress, PageAddress, U64),
    ) -> Outcome<Operands> {
        let kind = flags.page_type().ok_or(Status::INVALID_PARAM)?;
        if flags.reserved() != 0 {
            return Err(Status::INVALID_PARAM);
        }
        let size = flags.page_size();
        if kind != SwapType::Data && size != PageSize::Size4K {
            return Err(Status::INVALID_PAGE_SIZE);
        }
        let guest = self.snp_guest(context)?;
        if guest.policy.contains(SnpPolicy::PAGE_SWAP_DISABLE) {
            return Err(Status::POLICY_FAILURE);
        }
        let asid = guest.asid.ok_or(Status::INACTIVE)?;
        let record = match flags.contains(SnpPageSwapFlags::ROOT_MDATA_EN) {
            true => None,
            false => Some(self.record_address(mdata.get())?),
        };
        Ok(Operands {
            kind,
            size,
            record,
            asid,
            src: self.aligned_page(src.get(), size)?,
            dst: self.aligned_page(dst.get(), size)?,
        })
    }

    /// The address of a record in a page of records.
    fn record_address(&self, address: u64) -> Outcome<u64> {
        let address = self.range(address, size_of::<MdataEntry>() as u64)?;
        if !address.is_multiple_of(size_of::<MdataEntry>() as u64) {
            return Err(Status::INVALID_ADDRESS);
        }
        self.small_entry(address, PageState::Metadata)?;
        Ok(address)
    }

    /// The entry of a small page in a wanted state.
    fn small_entry(&self, address: u64, state: PageState) -> Outcome<RmpEntry> {
        let place = self.place(address)?;
        let entry = place.peek().entry(place.index);
        expect_small(&entry, state)?;
        Ok(entry)
    }

    fn record(&self, context: u64, at: Option<u64>) -> Outcome<MdataEntry> {
        let Some(address) = at else {
            return Ok(self.snp_guest(context)?.swap.root);
        };
        let place = self.place(address)?;
        let mut bytes = [0; size_of::<MdataEntry>()];
        let offset = address as usize % PAGE;
        place.lock().read(place.index, offset, &mut bytes);
        MdataEntry::read_from_bytes(&bytes).map_err(|_| Status::INVALID_MDATA_ENTRY)
    }

    fn set_record(&mut self, context: u64, at: Option<u64>, record: MdataEntry) -> Outcome {
        let Some(address) = at else {
            self.snp_guest_mut(context)?.swap.root = record;
            return Ok(());
        };
        let place = self.place(address)?;
        let offset = address as usize % PAGE;
        place.lock().write(place.index, offset, record.as_bytes());
        Ok(())
    }

    pub(super) fn page_swap_out(&mut self, context: u64, buffer: &SnpPageSwapOut) -> Outcome {
        let places = (buffer.src_paddr, buffer.dst_paddr, buffer.mdata_paddr);
        let o = self.swap_operands(context, buffer.flags, places)?;
        let entry = self.leaving(&o)?;
        self.writable(o.dst, o.size.bytes())?;
        let used = self.record(context, o.record)?;
        let is_inside = o.record.is_some_and(|at| at & !0xfff == o.src);
        if used.flags.contains(MdataFlags::VALID) || is_inside {
            return Err(Status::INVALID_MDATA_ENTRY);
        }
        let mut text = vec![0; o.size.bytes() as usize];
        self.read_page(context, &o, &mut text)?;
        let key = self.swap_key(context)?;
        let swap = &mut self.snp_guest_mut(context)?.swap;
        swap.iv = swap.iv.checked_add(1).ok_or(Status::AEAD_OFLOW)?;
        let [vmpl0, vmpl1, vmpl2, vmpl3] = entry.permissions.map(VmplPerms::from_raw);
        let mut record = MdataEntry {
            software_data: buffer.software_data,
            iv: swap.iv.into(),
            gpa: entry.gpa.into(),
            flags: flags_of(&o, &entry),
            vmpl0_perms: vmpl0,
            vmpl1_perms: vmpl1,
            vmpl2_perms: vmpl2,
            vmpl3_perms: vmpl3,
            ..MdataEntry::default()
        };
        record.auth_tag = Aes256Gcm::new(&key.into())
            .encrypt_in_place_detached(&nonce(&record).into(), record.as_bytes(), &mut text)
            .map_err(|_| Status::INVALID_LEN)?
            .into();
        self.write(o.dst, &text)?;
        self.set_record(context, o.record, record)?;
        self.with_entry(o.src, |entry| {
            Ok(match o.kind {
                SwapType::Metadata => RmpEntry::of(PageState::Firmware),
                _ => RmpEntry {
                    size: entry.size,
                    asid: entry.asid,
                    gpa: entry.gpa,
                    ..RmpEntry::of(PageState::PreGuest)
                },
            })
        })
    }

    /// The entry of a page that may leave.
    fn leaving(&self, o: &Operands) -> Outcome<RmpEntry> {
        if o.kind == SwapType::Metadata {
            return self.small_entry(o.src, PageState::Metadata);
        }
        let fixed = self.owned_entry(o.src, o.asid, PageState::PreSwap, o.size);
        let entry = match fixed {
            Err(Status::INVALID_PAGE_STATE) => {
                self.owned_entry(o.src, o.asid, PageState::PreGuest, o.size)?
            }
            fixed => fixed?,
        };
        match entry.vmsa == (o.kind == SwapType::Vmsa) {
            true => Ok(entry),
            false => Err(Status::INVALID_PARAM),
        }
    }

    fn read_page(&self, context: u64, o: &Operands, text: &mut [u8]) -> Outcome {
        if o.kind == SwapType::Metadata {
            return self.read(o.src, text);
        }
        let key = Arc::clone(&self.snp_guest(context)?.key);
        self.guest_read(&key, o.src, text)
    }

    fn swap_key(&mut self, context: u64) -> Outcome<[u8; 32]> {
        if let Some(key) = self.snp_guest(context)?.swap.key {
            return Ok(key);
        }
        let key = self.sp.random();
        self.snp_guest_mut(context)?.swap.key = Some(key);
        Ok(key)
    }

    pub(super) fn page_swap_in(&mut self, context: u64, buffer: &SnpPageSwapIn) -> Outcome {
        let places = (buffer.src_paddr, buffer.dst_paddr, buffer.mdata_paddr);
        let o = self.swap_operands(context, buffer.flags, places)?;
        let record = self.record(context, o.record)?;
        let flags = record.flags;
        let has = |flag| flags.contains(flag);
        if !has(MdataFlags::VALID)
            || has(MdataFlags::METADATA) != (o.kind == SwapType::Metadata)
            || has(MdataFlags::VMSA) != (o.kind == SwapType::Vmsa)
            || has(MdataFlags::PAGE_SIZE_2M) != (o.size == PageSize::Size2M)
        {
            return Err(Status::INVALID_MDATA_ENTRY);
        }
        let key = self.snp_guest(context)?.swap.key;
        let key = key.ok_or(Status::INVALID_MDATA_ENTRY)?;
        let came = self.coming(&o, &record)?;
        let mut text = vec![0; o.size.bytes() as usize];
        self.read(o.src, &mut text)?;
        let covered = MdataEntry {
            auth_tag: [0; 16],
            ..record
        };
        Aes256Gcm::new(&key.into())
            .decrypt_in_place_detached(
                &nonce(&record).into(),
                covered.as_bytes(),
                &mut text,
                &record.auth_tag.into(),
            )
            .map_err(|_| Status::BAD_MEASUREMENT)?;
        match o.kind {
            SwapType::Metadata => self.write(o.dst, &text)?,
            _ => {
                let key = Arc::clone(&self.snp_guest(context)?.key);
                self.guest_write(&key, o.dst, &text)?;
            }
        }
        self.set_record(context, o.record, MdataEntry::default())?;
        self.with_entry(o.dst, |_| Ok(came))
    }

    /// The entry that a page gets, if the page in its place may take it.
    fn coming(&self, o: &Operands, record: &MdataEntry) -> Outcome<RmpEntry> {
        if o.kind == SwapType::Metadata {
            self.small_entry(o.dst, PageState::Firmware)?;
            return Ok(RmpEntry::of(PageState::Metadata));
        }
        let entry = self.owned_entry(o.dst, o.asid, PageState::PreGuest, o.size)?;
        if entry.gpa != record.gpa.get() {
            return Err(Status::INVALID_PAGE_OWNER);
        }
        let state = match record.flags.contains(MdataFlags::VALIDATED) {
            true => PageState::GuestValid,
            false => PageState::GuestInvalid,
        };
        let permissions = [
            record.vmpl0_perms,
            record.vmpl1_perms,
            record.vmpl2_perms,
            record.vmpl3_perms,
        ];
        Ok(RmpEntry {
            vmsa: o.kind == SwapType::Vmsa,
            permissions: permissions.map(VmplPerms::bits),
            ..entry.with_state(state)
        })
    }
}

fn flags_of(o: &Operands, entry: &RmpEntry) -> MdataFlags {
    let mut flags = MdataFlags::VALID;
    for (flag, is_set) in [
        (MdataFlags::METADATA, o.kind == SwapType::Metadata),
        (MdataFlags::PAGE_SIZE_2M, o.size == PageSize::Size2M),
        (MdataFlags::VALIDATED, entry.state.is_validated()),
        (MdataFlags::VMSA, entry.vmsa),
    ] {
        if is_set {
            flags = flags | flag;
        }
    }
    flags
}

/// The number of a message, and zeros.
fn nonce(record: &MdataEntry) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(record.iv.as_bytes());
    nonce
}
