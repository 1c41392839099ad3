//! Answers of public sources for commands and states.
//!
//! One row a command, one cell a state: `=` works and changes nothing, `->X` leads to X, `free`
//! ends the guest, `.` is refused for the state, a number is another status, `-` cannot be and `?`
//! is silence. A colon precedes the mark of the source: `R` recalled from AMD's published interface
//! documents without reading them again, `D` deduced from how software behaves. Answers without a
//! mark are stated by an open source: Linux (`psp-sev.h`, `sev-dev.c`, KVM's `sev.c`, the SEV
//! self-tests), QEMU or the crate `sev`.

pub(super) const PLATFORM: &str = "
    INIT              ->INIT  .:R        .:R
    INIT_EX           ->INIT  .:R        .:R
    SHUTDOWN          =:R     ->UNINIT   ->UNINIT
    FACTORY_RESET     =       .          .
    PLATFORM_STATUS   =       =          =
    PEK_GEN           .       =          .:R
    PEK_CSR           .       =          =:R
    PEK_CERT_IMPORT   .       =          .:R
    PDH_CERT_EXPORT   .       =          =:R
    PDH_GEN           .       =          =:R
    DF_FLUSH          .       =          =
    DOWNLOAD_FIRMWARE ?       ?          ?
    GET_ID            ?       ?          ?
    NOP               ?       ?          ?
    LAUNCH_START      .       ->WORKING:D  =
    RECEIVE_START     .       ->WORKING:D  =
    GUEST_STATUS      .       .          =
    DECOMMISSION      .       .          ->INIT:R
";

/// Before MEASURE, FINISH is not settled: a self-test takes either state, but always measures.
pub(super) const GUEST: &str = "
    LAUNCH_UPDATE_DATA   =          .:R       .:R        .:R        .:R        .:R
    LAUNCH_UPDATE_VMSA   =          .:R       .:R        .:R        .:R        .:R
    LAUNCH_MEASURE       ->LSECRET  .:R       .:R        .:R        .:R        .:R
    LAUNCH_UPDATE_SECRET .:R        =         .:R        .:R        .:R        .:R
    LAUNCH_FINISH        .:D        ->RUNNING .:R        .:R        .:R        .:R
    ATTESTATION          .:D        =:D       =          =:D        .:D        .:D
    SEND_START           .:R        .:R       ->SUPDATE  .:R        .:R        .:R
    SEND_UPDATE_DATA     .:R        .:R       .:R        =          .:R        .:R
    SEND_UPDATE_VMSA     .:R        .:R       .:R        =          .:R        .:R
    SEND_FINISH          .:R        .:R       .:R        ->SENT     .:R        .:R
    SEND_CANCEL          .:R        .:R       .:R        ->RUNNING  .:R        .:R
    RECEIVE_UPDATE_DATA  .:R        .:R       .:R        .:R        =          .:R
    RECEIVE_UPDATE_VMSA  .:R        .:R       .:R        .:R        =          .:R
    RECEIVE_FINISH       .:R        .:R       .:R        .:R        ->RUNNING  .:R
    ACTIVATE             =          =         =          =          =          .:R
    ACTIVATE_EX          =          =         =          =          =          .:R
    DEACTIVATE           =          =         =          =          =          =
    GUEST_STATUS         =          =         =          =          =          =
    DECOMMISSION         free       free      free       free       free       free
    DBG_DECRYPT          =          =         =          =          =          .:R
    DBG_ENCRYPT          =          =         =          =          =          .:R
    COPY                 =          =         =          =          =          .:R
";

pub(super) const GUEST_PRESENCE: &str = "
    LAUNCH_UPDATE_DATA   =          0x08:R       0x10 0x01 0x01
    LAUNCH_UPDATE_VMSA   =          0x08:R       0x10 0x01 0x01
    LAUNCH_MEASURE       ->LSECRET  ->LSECRET:R  0x10 0x01 0x01
    LAUNCH_UPDATE_SECRET =          0x08:R       0x10 0x01 0x01
    LAUNCH_FINISH        ->RUNNING  ->RUNNING:R  0x10 0x01 0x01
    ATTESTATION          =          =:R          0x10 0x01 0x01
    SEND_START           ->SUPDATE  ->SUPDATE:R  0x10 0x01 0x01
    SEND_UPDATE_DATA     =          0x08:R       0x10 0x01 0x01
    SEND_UPDATE_VMSA     =          0x08:R       0x10 0x01 0x01
    SEND_FINISH          ->SENT     ->SENT:R     0x10 0x01 0x01
    SEND_CANCEL          ->RUNNING  ->RUNNING:R  0x10 0x01 0x01
    RECEIVE_UPDATE_DATA  =          0x08:R       0x10 0x01 0x01
    RECEIVE_UPDATE_VMSA  =          0x08:R       0x10 0x01 0x01
    RECEIVE_FINISH       ->RUNNING  ->RUNNING:R  0x10 0x01 0x01
    ACTIVATE             0x12:R     =            0x10 0x01 0x01
    ACTIVATE_EX          0x12:R     =            0x10 0x01 0x01
    DEACTIVATE           =          ?            0x10 0x01 0x01
    GUEST_STATUS         =          =            0x10 0x01 0x01
    DECOMMISSION         0x12:R     free         0x10 0x01 0x01
    DBG_DECRYPT          =          0x08:R       0x10 0x01 0x01
    DBG_ENCRYPT          =          0x08:R       0x10 0x01 0x01
    COPY                 =          0x08:R       0x10 0x01 0x01
";

pub(super) const SNP_PLATFORM: &str = "
    SNP_INIT                 ->INIT .:R
    SNP_INIT_EX              ->INIT .:R
    SNP_SHUTDOWN             =      ->UNINIT
    SNP_SHUTDOWN_EX          =      ->UNINIT
    SNP_PLATFORM_STATUS      =      =
    SNP_FEATURE_INFO         =      =
    SNP_DF_FLUSH             .:R    =
    SNP_PAGE_RECLAIM         .:R    =
    SNP_PAGE_UNSMASH         .:R    =
    SNP_PAGE_SET_STATE       .:R    =
    SNP_PAGE_MD_INIT         ?      ?
    SNP_CONFIG               ?      ?
    SNP_DOWNLOAD_FIRMWARE_EX ?      ?
    SNP_COMMIT               ?      ?
    SNP_VLEK_LOAD            ?      ?
    SNP_GCTX_CREATE          .      =
";

pub(super) const SNP_GUEST: &str = "
    SNP_LAUNCH_START  ->LAUNCH  .          .
    SNP_ACTIVATE      .:R       =          =
    SNP_ACTIVATE_EX   .:R       =          =
    SNP_LAUNCH_UPDATE .         =          .
    SNP_LAUNCH_FINISH .         ->RUNNING  .
    SNP_GUEST_REQUEST .         .:R        =
    SNP_PAGE_SWAP_OUT .         .          =:R
    SNP_PAGE_SWAP_IN  .         .          =:R
    SNP_PAGE_MOVE     .         .          =:R
    SNP_DBG_DECRYPT   .         =:D        =
    SNP_DBG_ENCRYPT   .         =:D        =
    SNP_GUEST_STATUS  =         =          =
    SNP_DECOMMISSION  free      free       free
";

pub(super) const SNP_PRESENCE: &str = "
    SNP_LAUNCH_START  -          ->LAUNCH   0x10:D 0x01:D
    SNP_ACTIVATE      0x12:R     =          0x10:D 0x01:D
    SNP_ACTIVATE_EX   0x12:R     =          0x10:D 0x01:D
    SNP_LAUNCH_UPDATE =          0x08:R     0x10:D 0x01:D
    SNP_LAUNCH_FINISH ->RUNNING  ?          0x10:D 0x01:D
    SNP_GUEST_REQUEST =          0x08:R     0x10:D 0x01:D
    SNP_PAGE_SWAP_OUT =:R        ?          0x10:D 0x01:D
    SNP_PAGE_SWAP_IN  =:R        ?          0x10:D 0x01:D
    SNP_PAGE_MOVE     =:R        ?          0x10:D 0x01:D
    SNP_DBG_DECRYPT   =:D        ?          0x10:D 0x01:D
    SNP_DBG_ENCRYPT   =:D        ?          0x10:D 0x01:D
    SNP_GUEST_STATUS  =          =          0x10:D 0x01:D
    SNP_DECOMMISSION  free       free       0x10:D 0x01:D
";

/// Reason for which the model's answers differ from the reference in some cells of a table.
#[derive(Debug)]
pub(super) struct Explanation {
    /// The table's title.
    pub(super) table: &'static str,
    /// The model's answers that it is for, in rows as above; `_` where it is not about a state.
    pub(super) cells: &'static str,
    pub(super) because: &'static str,
}

pub(super) const EXPLANATIONS: &[Explanation] = &[
    Explanation {
        table: "Platform, SEV and SEV-ES",
        cells: "DOWNLOAD_FIRMWARE 0x15 0x15 0x15",
        because: "another firmware to load is **not modelled**; the command is refused before the \
                  state is looked at.",
    },
    Explanation {
        table: "Platform, SEV and SEV-ES",
        cells: "GET_ID = = =
                NOP    = = =",
        because: "the sources give number and buffer but no states. Neither command reads or \
                  changes anything that depends on the state, so the model allows them in all. \
                  Linux sends GET_ID without a look at the state.",
    },
    Explanation {
        table: "SEV and SEV-ES guest, where no state forbids the command",
        cells: "DEACTIVATE _ 0x08 _ _ _",
        because: "no source has a DEACTIVATE of a guest without ASID, since KVM deactivates only what it activated. \
                  There is nothing to unbind, and INACTIVE is the status that says so.",
    },
    Explanation {
        table: "SEV and SEV-ES guest, where no state forbids the command",
        cells: "DBG_DECRYPT _ = _ _ _",
        because: "the reference, as recalled, asks the debug commands for an active guest. \
                  DBG_DECRYPT writes to memory of the host and reads with the key in the guest's \
                  context, for which the memory controller needs no ASID; the model demands one only \
                  where memory of the guest is written.",
    },
    Explanation {
        table: "Platform, SEV-SNP",
        cells: "SNP_DOWNLOAD_FIRMWARE_EX 0x15 0x15",
        because: "another firmware to load is **not modelled**; the command is refused before the \
                  state is looked at.",
    },
    Explanation {
        table: "Platform, SEV-SNP",
        cells: "SNP_CONFIG    0x01 =
                SNP_COMMIT    0x01 =
                SNP_VLEK_LOAD 0x01 =",
        because: "the sources give the buffers but no states. Linux initialises SNP before it sends \
                  any of them, so the model allows them where Linux sends them.",
    },
    Explanation {
        table: "Platform, SEV-SNP",
        cells: "SNP_PAGE_MD_INIT 0x01 =",
        because: "no source says when a page for records may be made. It changes the RMP, so the model \
                  treats it as the other commands of pages.",
    },
    Explanation {
        table: "SEV-SNP guest, where no state forbids the command",
        cells: "SNP_LAUNCH_FINISH _ ->RUNNING _ _",
        because: "no source says that finishing needs an ASID, and it touches no page of the guest: \
                  the digest is in the context. KVM always activates before.",
    },
    Explanation {
        table: "SEV-SNP guest, where no state forbids the command",
        cells: "SNP_PAGE_MOVE   _ 0x08 _ _
                SNP_PAGE_SWAP_OUT _ 0x08 _ _
                SNP_PAGE_SWAP_IN _ 0x08 _ _
                SNP_DBG_DECRYPT _ 0x08 _ _
                SNP_DBG_ENCRYPT _ 0x08 _ _",
        because: "these take a page that the RMP gives to the guest, and the RMP names the owner by \
                  its ASID: a guest without one owns no page, so the model answers INACTIVE.",
    },
];
