//! Command numbers and the layout of their buffers.
//!
//! The layouts are data, so that the check of reserved bytes, the documentation and the tests read
//! the same table. Sources: Linux `include/linux/psp-sev.h` and `include/uapi/linux/psp-sev.h`;
//! layouts that Linux does not have are listed in `docs/inferred.md`.

use std::fmt;

/// A field of a command buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name, as Linux has it.
    pub name: &'static str,
    /// Offset in bytes.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
    /// True if the firmware writes it.
    pub out: bool,
}

macro_rules! commands {
    ($($name:ident = $id:literal $len:literal $doc:literal [$($field:tt)*])*) => {
        /// A command of the AMD SP, by the number in bits 26:16 of the command register.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        #[repr(u32)]
        pub enum Command {
            $(#[doc = $doc] $name = $id,)*
        }

        impl Command {
            /// Every command, in the order of this list.
            pub const ALL: &'static [Command] = &[$(Command::$name),*];

            /// The command with this number.
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Command::$name),)*
                    _ => None,
                }
            }

            /// The name, as in the manuals.
            pub fn name(self) -> &'static str {
                match self { $(Command::$name => stringify!($name),)* }
            }

            /// The purpose of the command, in one sentence.
            pub fn purpose(self) -> &'static str {
                match self { $(Command::$name => $doc,)* }
            }

            /// Length of the command buffer; 0 if there is none.
            pub fn buffer_len(self) -> usize {
                match self { $(Command::$name => $len,)* }
            }

            /// Fields of the command buffer; bytes outside of them are reserved and must be 0.
            pub fn fields(self) -> &'static [Field] {
                match self { $(Command::$name => fields![@ [] $($field)*],)* }
            }
        }
    };
}

/// `name offset length` for an input, `name offset length out` for a field that is written.
macro_rules! fields {
    (@ [$($done:expr,)*]) => { &[$($done),*] };
    (@ [$($done:expr,)*] $n:ident $o:literal $l:literal out $(, $($rest:tt)*)?) => {
        fields![@ [$($done,)* Field { name: stringify!($n), offset: $o, len: $l, out: true },]
            $($($rest)*)?]
    };
    (@ [$($done:expr,)*] $n:ident $o:literal $l:literal $(, $($rest:tt)*)?) => {
        fields![@ [$($done,)* Field { name: stringify!($n), offset: $o, len: $l, out: false },]
            $($($rest)*)?]
    };
}

commands! {
    INIT = 0x01 0x14 "Initialises the platform for SEV and SEV-ES."
        [flags 0 4, tmr_address 8 8, tmr_len 0x10 4]
    SHUTDOWN = 0x02 0 "Ends SEV and SEV-ES; every guest is forgotten." []
    FACTORY_RESET = 0x03 0 "Gives the platform a new identity." []
    PLATFORM_STATUS = 0x04 0x0c "Reports version, state and number of guests."
        [api_major 0 1 out, api_minor 1 1 out, state 2 1 out, flags 3 4 out, build 7 1 out,
         guest_count 8 4 out]
    PEK_GEN = 0x05 0 "Makes a new platform endorsement key, signed by the platform itself." []
    PEK_CSR = 0x06 0x0c "Exports a request to certify the platform endorsement key."
        [address 0 8, len 8 4 out]
    PEK_CERT_IMPORT = 0x07 0x1c "Gives the platform to an owner."
        [pek_cert_address 0 8, pek_cert_len 8 4, oca_cert_address 0x10 8, oca_cert_len 0x18 4]
    PDH_CERT_EXPORT = 0x08 0x1c "Exports the Diffie-Hellman key and its certificate chain."
        [pdh_cert_address 0 8, pdh_cert_len 8 4 out, cert_chain_address 0x10 8,
         cert_chain_len 0x18 4 out]
    PDH_GEN = 0x09 0 "Makes a new Diffie-Hellman key." []
    DF_FLUSH = 0x0a 0 "Flushes the data fabric's write buffers." []
    DOWNLOAD_FIRMWARE = 0x0b 0x0c "Replaces the firmware." [address 0 8, len 8 4]
    GET_ID = 0x0c 0x0c "Reports the identity of the chip." [address 0 8, len 8 4 out]
    INIT_EX = 0x0d 0x24 "INIT with the persistent data in a buffer."
        [length 0 4, flags 4 4, tmr_address 8 8, tmr_len 0x10 4, nv_address 0x18 8, nv_len 0x20 4]
    NOP = 0x0e 0 "Does nothing." []
    DECOMMISSION = 0x20 4 "Forgets a guest." [handle 0 4]
    ACTIVATE = 0x21 8 "Binds a guest to an ASID." [handle 0 4, asid 4 4]
    DEACTIVATE = 0x22 4 "Unbinds a guest from its ASID." [handle 0 4]
    GUEST_STATUS = 0x23 0x0d "Reports policy, ASID and state of a guest."
        [handle 0 4, policy 4 4 out, asid 8 4 out, state 0xc 1 out]
    COPY = 0x24 0x18 "Copies guest memory to another place of the same guest."
        [handle 0 4, length 4 4, src 8 8, dst 0x10 8]
    ACTIVATE_EX = 0x25 0x18 "ACTIVATE for some cores."
        [ex_len 0 4, handle 4 4, asid 8 4, numids 0xc 4, ids_paddr 0x10 8]
    LAUNCH_START = 0x30 0x24 "Creates a guest to be launched."
        [handle 0 4 out, policy 4 4, dh_cert 8 8, dh_cert_len 0x10 4, session 0x18 8,
         session_len 0x20 4]
    LAUNCH_UPDATE_DATA = 0x31 0x14 "Measures and encrypts memory of a guest."
        [handle 0 4, address 8 8, len 0x10 4]
    LAUNCH_UPDATE_VMSA = 0x32 0x14 "Measures and encrypts the register state of a vCPU."
        [handle 0 4, address 8 8, len 0x10 4]
    LAUNCH_MEASURE = 0x33 0x14 "Returns the launch measurement."
        [handle 0 4, address 8 8, len 0x10 4 out]
    LAUNCH_UPDATE_SECRET = 0x34 0x34 "Puts a guest owner's secret into guest memory."
        [handle 0 4, hdr_address 8 8, hdr_len 0x10 4, guest_address 0x18 8, guest_len 0x20 4,
         trans_address 0x28 8, trans_len 0x30 4]
    LAUNCH_FINISH = 0x35 4 "Ends the launch; the guest may run." [handle 0 4]
    ATTESTATION = 0x36 0x24 "Returns a report signed by the platform endorsement key."
        [handle 0 4, address 8 8, mnonce 0x10 16, len 0x20 4 out]
    SEND_START = 0x40 0x44 "Begins to send a guest to another platform."
        [handle 0 4, policy 4 4 out, pdh_cert_address 8 8, pdh_cert_len 0x10 4,
         plat_certs_address 0x18 8, plat_certs_len 0x20 4, amd_certs_address 0x28 8,
         amd_certs_len 0x30 4, session_address 0x38 8, session_len 0x40 4 out]
    SEND_UPDATE_DATA = 0x41 0x34 "Encrypts guest memory for the other platform."
        [handle 0 4, hdr_address 8 8, hdr_len 0x10 4 out, guest_address 0x18 8, guest_len 0x20 4,
         trans_address 0x28 8, trans_len 0x30 4 out]
    SEND_UPDATE_VMSA = 0x42 0x34 "Encrypts register state for the other platform."
        [handle 0 4, hdr_address 8 8, hdr_len 0x10 4 out, guest_address 0x18 8, guest_len 0x20 4,
         trans_address 0x28 8, trans_len 0x30 4 out]
    SEND_FINISH = 0x43 4 "Ends sending; the guest may no longer run here." [handle 0 4]
    SEND_CANCEL = 0x44 4 "Gives up sending; the guest runs on." [handle 0 4]
    RECEIVE_START = 0x50 0x24 "Creates a guest to be received."
        [handle 0 4 out, policy 4 4, pdh_cert_address 8 8, pdh_cert_len 0x10 4,
         session_address 0x18 8, session_len 0x20 4]
    RECEIVE_UPDATE_DATA = 0x51 0x34 "Puts received memory into the guest."
        [handle 0 4, hdr_address 8 8, hdr_len 0x10 4, guest_address 0x18 8, guest_len 0x20 4,
         trans_address 0x28 8, trans_len 0x30 4]
    RECEIVE_UPDATE_VMSA = 0x52 0x34 "Puts received register state into the guest."
        [handle 0 4, hdr_address 8 8, hdr_len 0x10 4, guest_address 0x18 8, guest_len 0x20 4,
         trans_address 0x28 8, trans_len 0x30 4]
    RECEIVE_FINISH = 0x53 4 "Ends receiving; the guest may run." [handle 0 4]
    DBG_DECRYPT = 0x60 0x1c "Decrypts guest memory for the host, if the policy allows."
        [handle 0 4, src 8 8, dst 0x10 8, len 0x18 4]
    DBG_ENCRYPT = 0x61 0x1c "Writes guest memory for the host, if the policy allows."
        [handle 0 4, src 8 8, dst 0x10 8, len 0x18 4]
    SNP_INIT = 0x81 0 "Initialises the platform for SEV-SNP." []
    SNP_SHUTDOWN = 0x82 0 "Ends SEV-SNP." []
    SNP_PLATFORM_STATUS = 0x83 8 "Reports version, state and security level."
        [status_paddr 0 8]
    SNP_DF_FLUSH = 0x84 0 "Flushes the data fabric's write buffers." []
    SNP_INIT_EX = 0x85 0x40 "SNP_INIT with options."
        [flags 0 4, list_paddr 8 8, max_snp_asid 0x10 2]
    SNP_SHUTDOWN_EX = 0x86 8 "SNP_SHUTDOWN with options." [len 0 4, flags 4 4]
    SNP_DECOMMISSION = 0x90 8 "Forgets a guest and unbinds its ASID." [gctx_paddr 0 8]
    SNP_ACTIVATE = 0x91 0x0c "Binds a guest to an ASID." [gctx_paddr 0 8, asid 8 4]
    SNP_GUEST_STATUS = 0x92 0x10 "Reports policy, ASID and state of a guest."
        [gctx_paddr 0 8, address 8 8]
    SNP_GCTX_CREATE = 0x93 8 "Creates a guest context in a page." [gctx_paddr 0 8]
    SNP_GUEST_REQUEST = 0x94 0x18 "Answers an encrypted message of a guest."
        [gctx_paddr 0 8, req_paddr 8 8, res_paddr 0x10 8]
    SNP_ACTIVATE_EX = 0x95 0x20 "SNP_ACTIVATE for some cores."
        [ex_len 0 4, gctx_paddr 8 8, asid 0x10 4, numids 0x14 4, id_paddr 0x18 8]
    SNP_LAUNCH_START = 0xa0 0x30 "Begins the launch of a guest."
        [gctx_paddr 0 8, policy 8 8, ma_gctx_paddr 0x10 8, flags 0x18 4, desired_tsc_khz 0x1c 4,
         gosvw 0x20 16]
    SNP_LAUNCH_UPDATE = 0xa1 0x20 "Measures and encrypts a page of a guest."
        [gctx_paddr 0 8, flags 8 4, address 0x10 8, vmpl1_perms 0x19 1, vmpl2_perms 0x1a 1,
         vmpl3_perms 0x1b 1]
    SNP_LAUNCH_FINISH = 0xa2 0x40 "Ends the launch; the guest may run."
        [gctx_paddr 0 8, id_block_paddr 8 8, id_auth_paddr 0x10 8, flags 0x18 8, host_data 0x20 32]
    SNP_DBG_DECRYPT = 0xb0 0x18 "Decrypts a guest page for the host, if the policy allows."
        [gctx_paddr 0 8, src 8 8, dst 0x10 8]
    SNP_DBG_ENCRYPT = 0xb1 0x18 "Writes a guest page for the host, if the policy allows."
        [gctx_paddr 0 8, src 8 8, dst 0x10 8]
    SNP_PAGE_SWAP_OUT = 0xc0 0 "Moves a page out of memory." []
    SNP_PAGE_SWAP_IN = 0xc1 0 "Moves a page into memory." []
    SNP_PAGE_MOVE = 0xc2 0x20 "Moves a guest page to another place in memory."
        [gctx_paddr 0 8, flags 8 4, src 0x10 8, dst 0x18 8]
    SNP_PAGE_MD_INIT = 0xc3 0 "Makes a page for swap records." []
    SNP_PAGE_SET_STATE = 0xc6 0x10 "Fixes pages to the hypervisor." [length 0 4, list_paddr 8 8]
    SNP_PAGE_RECLAIM = 0xc7 8 "Gives a page back to the hypervisor." [paddr 0 8]
    SNP_PAGE_UNSMASH = 0xc8 8 "Joins 512 small pages to a large one." [paddr 0 8]
    SNP_CONFIG = 0xc9 0x40 "Sets the reported security level."
        [reported_tcb 0 8, flags 8 4]
    SNP_DOWNLOAD_FIRMWARE_EX = 0xca 0 "Replaces the firmware while guests run." []
    SNP_COMMIT = 0xcb 4 "Makes the current firmware the oldest to go back to." [length 0 4]
    SNP_VLEK_LOAD = 0xcd 0x10 "Loads a versioned loaded endorsement key."
        [length 0 4, vlek_wrapped_version 4 1, vlek_wrapped_address 8 8]
    SNP_FEATURE_INFO = 0xce 0x10 "Reports the features of the firmware."
        [length 0 4, ecx_in 4 4, feature_info_paddr 8 8]
}

impl Command {
    /// Returns true if the command belongs to SEV-SNP.
    pub fn is_snp(self) -> bool {
        self as u32 >= 0x80
    }

    /// Returns true if the firmware writes into the command buffer.
    pub fn writes_buffer(self) -> bool {
        self.fields().iter().any(|f| f.out)
    }

    /// Returns true if every reserved byte of a buffer is 0.
    pub(crate) fn reserved_is_zero(self, buffer: &[u8]) -> bool {
        buffer.iter().enumerate().all(|(i, byte)| {
            *byte == 0
                || self
                    .fields()
                    .iter()
                    .any(|f| (f.offset..f.offset + f.len).contains(&i))
        })
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_ordered_inside_the_buffer_and_do_not_overlap() {
        for command in Command::ALL {
            let mut end = 0;
            for field in command.fields() {
                assert!(field.offset >= end, "{command} {}", field.name);
                end = field.offset + field.len;
            }
            assert!(end <= command.buffer_len(), "{command}");
        }
    }

    #[test]
    fn numbers_lead_back_to_their_command() {
        for id in 0..0x800 {
            if let Some(command) = Command::from_id(id) {
                assert_eq!(command as u32, id);
            }
        }
        assert_eq!(Command::from_id(0), None);
    }
}
