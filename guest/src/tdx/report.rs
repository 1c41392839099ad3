//! A TDREPORT, field by field (TDX module ABI, TDREPORT_STRUCT).

use super::get_quote::REPORT_LEN;

/// A TDREPORT as TDG.MR.REPORT writes it.
#[derive(Clone, Copy, Debug)]
pub struct TdReport<'a>(&'a [u8; REPORT_LEN]);

impl<'a> TdReport<'a> {
    /// Over the bytes of a report.
    pub const fn new(bytes: &'a [u8; REPORT_LEN]) -> Self {
        Self(bytes)
    }

    /// REPORTDATA: what the TD put in.
    pub fn report_data(&self) -> [u8; 64] {
        self.field(128)
    }

    /// TEE_TCB_SVN: security versions of the TDX module's parts.
    pub fn tee_tcb_svn(&self) -> [u8; 16] {
        self.field(264)
    }

    /// MRSEAM: the measurement of the TDX module.
    pub fn mrseam(&self) -> [u8; 48] {
        self.field(280)
    }

    /// ATTRIBUTES of the TD.
    pub fn attributes(&self) -> u64 {
        u64::from_le_bytes(self.field(512))
    }

    /// XFAM of the TD.
    pub fn xfam(&self) -> u64 {
        u64::from_le_bytes(self.field(520))
    }

    /// MRTD: the measurement of the launch.
    pub fn mrtd(&self) -> [u8; 48] {
        self.field(528)
    }

    /// MRCONFIGID, MROWNER and MROWNERCONFIG, of the host's choice.
    pub fn measurement_ids(&self) -> [[u8; 48]; 3] {
        [self.field(576), self.field(624), self.field(672)]
    }

    /// The four RTMRs.
    pub fn rtmrs(&self) -> [[u8; 48]; 4] {
        [720, 768, 816, 864].map(|at| self.field(at))
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut field = [0; N];
        for (to, from) in field.iter_mut().zip(self.0.iter().skip(at)) {
            *to = *from;
        }
        field
    }
}
