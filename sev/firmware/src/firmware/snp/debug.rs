//! SNP debug commands.

use super::super::{Firmware, Outcome};
use crate::cipher::MemoryKey;
use crate::command::{PageAddress, SnpDbgDecrypt, SnpDbgEncrypt, SnpPolicy};
use crate::machine::region::PAGE;
use crate::status::Status;
use std::sync::Arc;

impl Firmware<'_> {
    /// The guest's key and ASID, if its policy allows debugging.
    fn snp_debug(&self, context: u64) -> Outcome<(Arc<MemoryKey>, u32)> {
        let guest = self.snp_guest(context)?;
        if !guest.policy.contains(SnpPolicy::DEBUG) {
            return Err(Status::POLICY_FAILURE);
        }
        Ok((Arc::clone(&guest.key), guest.asid.ok_or(Status::INACTIVE)?))
    }

    /// A page that belongs to the guest, in any state.
    fn guest_page(&self, address: PageAddress, asid: u32) -> Outcome<u64> {
        let address = self.small_page(address)?;
        let place = self.place(address)?;
        let entry = place.peek().entry(place.index);
        if !entry.state.is_guest() {
            Err(Status::INVALID_PAGE_STATE)
        } else if entry.asid != asid {
            Err(Status::INVALID_PAGE_OWNER)
        } else {
            Ok(address)
        }
    }

    pub(super) fn snp_dbg_decrypt(&mut self, context: u64, buffer: &SnpDbgDecrypt) -> Outcome {
        let (key, asid) = self.snp_debug(context)?;
        let src = self.guest_page(buffer.src_paddr, asid)?;
        let dst = self.small_page(buffer.dst_paddr)?;
        let mut page = [0; PAGE];
        self.guest_read(&key, src, &mut page)?;
        self.write(dst, &page)
    }

    pub(super) fn snp_dbg_encrypt(&mut self, context: u64, buffer: &SnpDbgEncrypt) -> Outcome {
        let (key, asid) = self.snp_debug(context)?;
        let src = self.small_page(buffer.src_paddr)?;
        let dst = self.guest_page(buffer.dst_paddr, asid)?;
        let mut page = [0; PAGE];
        self.read(src, &mut page)?;
        self.guest_write(&key, dst, &page)
    }
}
