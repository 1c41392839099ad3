//! Capabilities: the numbers that `KVM_CHECK_EXTENSION` and `KVM_ENABLE_CAP` take.

macro_rules! capabilities {
    ($($name:ident = $number:literal;)*) => {
        $(
            #[doc = concat!("`KVM_CAP_", stringify!($name), "`.")]
            pub const $name: u32 = $number;
        )*

        /// The name after `KVM_CAP_`.
        pub const fn name(number: u32) -> Option<&'static str> {
            match number {
                $($number => Some(stringify!($name)),)*
                _ => None,
            }
        }
    };
}

capabilities! {
    IRQCHIP = 0;
    HLT = 1;
    USER_MEMORY = 3;
    SET_TSS_ADDR = 4;
    EXT_CPUID = 7;
    NR_VCPUS = 9;
    NR_MEMSLOTS = 10;
    PIT = 11;
    MP_STATE = 14;
    COALESCED_MMIO = 15;
    SYNC_MMU = 16;
    DESTROY_MEMORY_REGION_WORKS = 21;
    SET_GUEST_DEBUG = 23;
    IRQ_ROUTING = 25;
    IRQ_INJECT_STATUS = 26;
    JOIN_MEMORY_REGIONS_WORKS = 30;
    MCE = 31;
    IRQFD = 32;
    PIT2 = 33;
    SET_BOOT_CPU_ID = 34;
    PIT_STATE2 = 35;
    IOEVENTFD = 36;
    SET_IDENTITY_MAP_ADDR = 37;
    ADJUST_CLOCK = 39;
    INTERNAL_ERROR_DATA = 40;
    VCPU_EVENTS = 41;
    DEBUGREGS = 50;
    X86_ROBUST_SINGLESTEP = 51;
    ENABLE_CAP = 54;
    XSAVE = 55;
    XCRS = 56;
    TSC_CONTROL = 60;
    GET_TSC_KHZ = 61;
    MAX_VCPUS = 66;
    ONE_REG = 70;
    TSC_DEADLINE_TIMER = 72;
    SYNC_REGS = 74;
    KVMCLOCK_CTRL = 76;
    SIGNAL_MSI = 77;
    READONLY_MEM = 81;
    IRQFD_RESAMPLE = 82;
    ENABLE_CAP_VM = 98;
    IOEVENTFD_NO_LENGTH = 100;
    CHECK_EXTENSION_VM = 105;
    DISABLE_QUIRKS = 116;
    MULTI_ADDRESS_SPACE = 118;
    SPLIT_IRQCHIP = 121;
    IOEVENTFD_ANY_LENGTH = 122;
    VCPU_ATTRIBUTES = 127;
    MAX_VCPU_ID = 128;
    X2APIC_API = 129;
    IMMEDIATE_EXIT = 136;
    GET_MSR_FEATURES = 153;
    COALESCED_PIO = 162;
    EXCEPTION_PAYLOAD = 164;
    MANUAL_DIRTY_LOG_PROTECT2 = 168;
    X86_USER_SPACE_MSR = 188;
    X86_MSR_FILTER = 189;
    X86_BUS_LOCK_EXIT = 193;
    SET_GUEST_DEBUG2 = 195;
    VM_COPY_ENC_CONTEXT_FROM = 197;
    SREGS2 = 200;
    EXIT_HYPERCALL = 201;
    BINARY_STATS_FD = 203;
    VM_MOVE_ENC_CONTEXT_FROM = 206;
    XSAVE2 = 208;
    SYS_ATTRIBUTES = 209;
    PMU_CAPABILITY = 212;
    DISABLE_QUIRKS2 = 213;
    VM_TSC_CONTROL = 214;
    X86_TRIPLE_FAULT_EVENT = 218;
    USER_MEMORY2 = 231;
    MEMORY_FAULT_INFO = 232;
    MEMORY_ATTRIBUTES = 233;
    GUEST_MEMFD = 234;
    VM_TYPES = 235;
    PRE_FAULT_MEMORY = 236;
    X86_APIC_BUS_CYCLES_NS = 237;
    GUEST_MEMFD_FLAGS = 244;
}
