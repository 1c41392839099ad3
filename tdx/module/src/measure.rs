//! MRTD and RTMRs.

use sha2::{Digest, Sha384};

/// A SHA-384 digest.
pub type Digest384 = [u8; 48];

/// The measurement registers of a TD.
#[derive(Clone, Default)]
pub(crate) struct Measurement {
    building: Sha384,
    /// 0 until TDH.MR.FINALIZE.
    pub(crate) mrtd: Mr,
    pub(crate) rtmr: [Mr; 4],
    /// TDINFO hash, kept from one TDG.MR.REPORT to the next until an RTMR changes.
    pub(crate) tee_info_hash: Option<Digest384>,
}

/// A digest that starts as zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mr(pub(crate) Digest384);

impl Default for Mr {
    fn default() -> Self {
        Mr([0; 48])
    }
}

impl Measurement {
    fn record(&mut self, name: &[u8], gpa: u64) {
        let mut record = [0; 128];
        record[..name.len()].copy_from_slice(name);
        record[16..24].copy_from_slice(&gpa.to_le_bytes());
        self.building.update(record);
    }

    /// TDH.MEM.PAGE.ADD measures the address.
    pub(crate) fn page_add(&mut self, gpa: u64) {
        self.record(b"MEM.PAGE.ADD", gpa);
    }

    /// TDH.MR.EXTEND measures the address and 256 bytes.
    pub(crate) fn extend(&mut self, gpa: u64, chunk: &[u8; 256]) {
        self.record(b"MR.EXTEND", gpa);
        self.building.update(chunk);
    }

    pub(crate) fn finalize(&mut self) {
        self.mrtd = Mr(self.building.finalize_reset().into());
    }

    pub(crate) fn extend_rtmr(&mut self, index: usize, data: &[u8; 48]) {
        if let Some(rtmr) = self.rtmr.get_mut(index) {
            let mut hash = Sha384::new();
            hash.update(rtmr.0);
            hash.update(data);
            *rtmr = Mr(hash.finalize().into());
            self.tee_info_hash = None;
        }
    }
}
