//! One SNP guest at fixed places, for the tests of SNP commands.

use super::*;
use soft_amd_sp::measure::PageType;
use soft_amd_sp::message::GuestChannel;
use soft_amd_sp::{GuestPage, Platform, RmpUpdate, Status};

pub const GCTX: u64 = 0x1000;
pub const ASID: u32 = 1;
pub const POLICY: SnpPolicy = SnpPolicy::SMT;
pub const SECRETS: u64 = 0x50_0000;
pub const REQUEST: u64 = 0x41_0000;
pub const RESPONSE: u64 = 0x42_0000;
pub const LARGE: u64 = 0x80_0000;

pub fn finish(p: &Platform) -> Status {
    snp_finish(p, GCTX)
}

pub fn digest(p: &Platform) -> [u8; 48] {
    p.snapshot().snp_guests[0].launch_digest
}

/// A running guest with a secrets page at guest address 0x8000, and its channel at a VMPL.
pub fn with_channel(p: &Platform, vmpl: u8) -> GuestChannel {
    snp_launch(p, GCTX, POLICY, ASID);
    snp_add(p, GCTX, ASID, SECRETS, 0x8000, PageType::Secrets)
        .ok()
        .unwrap();
    finish(p).ok().unwrap();
    p.rmpupdate(RESPONSE, &RmpUpdate::firmware()).unwrap();
    channel(p, vmpl)
}

pub fn channel(p: &Platform, vmpl: u8) -> GuestChannel {
    let mut page = [0; 4096];
    p.guest_read(&GuestPage::new(ASID, 0x8000, SECRETS), &mut page)
        .unwrap();
    GuestChannel::from_secrets_page(&page, vmpl).unwrap()
}

/// SNP_GUEST_REQUEST with the response at an address.
pub fn guest_request(p: &Platform, response: u64) -> Status {
    let request = SnpGuestRequest {
        gctx_paddr: page(GCTX),
        request_paddr: page(REQUEST),
        response_paddr: page(response),
    };
    run(p, request)
}

pub fn exchange(p: &Platform, request: &[u8]) -> Result<Vec<u8>, Status> {
    p.host_write(REQUEST, request).unwrap();
    guest_request(p, RESPONSE).ok()?;
    let mut page = vec![0; 4096];
    p.host_read(RESPONSE, &mut page).unwrap();
    Ok(page)
}
