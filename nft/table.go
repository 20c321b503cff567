package nft

import (
	"fmt"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// table is a table as it must be.
type table struct {
	family   nftables.TableFamily
	name     string
	flags    uint32
	sets     []set
	counters []string
	chains   []chain
}

// set is a set or a map as it must be.
type set struct {
	name   string
	key    kind
	value  kind       // of a map
	object objectKind // of a map of objects
	flags  uint32
	size   uint32 // how many elements it may hold; 0: as many as come
	// counted: each element counts the packets that are found to have its key, and their bytes.
	counted bool
	// permits: Permit and Revoke fill it.
	permits bool
	// ofOtherNodes: it says what other nodes may send, which State.KeepSenders keeps.
	ofOtherNodes bool
	// ofPods: it says which pods are selected, of which State.Keep keeps none.
	ofPods bool
}

// fromState reports whether a State says what is in the set.
func (s set) fromState() bool { return !s.permits && s.flags&flagTimeout == 0 }

// The flags of sets that are used here.
const (
	flagMap      = unix.NFT_SET_MAP
	flagObject   = unix.NFT_SET_OBJECT
	flagInterval = unix.NFT_SET_INTERVAL
	flagTimeout  = unix.NFT_SET_TIMEOUT
	flagDynamic  = unix.NFT_SET_EVAL // rules put elements in
)

// The flags of tables (linux/netfilter/nf_tables.h), and the attribute that says whose an owned one is.
const (
	// only the socket that made it, or took it over, writes to it; `nft flush ruleset` leaves it out
	flagOwner      = 1 << 1
	flagPersist    = 1 << 2 // it stays when that socket is closed, and is nobody's then (Linux 6.9)
	flagsOwned     = flagOwner | flagPersist
	attrTableOwner = 7 // NFTA_TABLE_OWNER
)

// attrSetExpr is the attribute of what each element of a set has of its own (NFTA_SET_EXPR).
const attrSetExpr = 17

// anonymous is what the kernel makes the name of an anonymous set from (linux: nf_tables_set_alloc_name).
const anonymous = "__set%d"

// chain is a chain as it must be.
type chain struct {
	name  string
	hook  hook // zero: only jumped to
	rules []rule
}

// hook is where a chain is called. All accept by policy: what has to be dropped is dropped by a rule, which counts.
type hook struct {
	kind nftables.ChainType
	name string
	num  nftables.ChainHook
	prio nftables.ChainPriority
	// device is the link whose packets a chain of the netdev family sees.
	device string
}

// id prints family and name of the table.
func (t table) id() string {
	switch t.family {
	case nftables.TableFamilyARP:
		return "arp " + t.name
	case nftables.TableFamilyNetdev:
		return "netdev " + t.name
	}
	return "inet " + t.name
}

// definition prints what nft takes after the name of a table.
func (t table) definition() string {
	switch t.flags {
	case flagsOwned:
		return " { flags owner,persist; }"
	case flagOwner:
		return " { flags owner; }"
	}
	return ""
}

func (s set) noun() string {
	if s.flags&(flagMap|flagObject) != 0 {
		return "map"
	}
	return "set"
}

// definition prints what is in braces when nft makes the set.
func (s set) definition() string {
	out := "{ type " + s.key.Name
	if s.flags&flagMap != 0 {
		out += " : "
		if s.value.interval {
			out += "interval "
		}
		out += s.value.Name
	}
	if s.flags&flagObject != 0 {
		out += " : " + s.object.String()
	}
	out += ";"
	if s.size > 0 {
		out += fmt.Sprintf(" size %d;", s.size)
	}
	if s.flags&flagInterval != 0 {
		out += " flags interval;"
	}
	switch s.flags & (flagDynamic | flagTimeout) {
	case flagTimeout:
		out += " flags timeout;"
	case flagDynamic | flagTimeout:
		out += " flags dynamic,timeout;"
	}
	if s.counted {
		out += " counter;"
	}
	return out + " }"
}

// definition prints what nft takes after the name of a chain.
func (h hook) definition() string {
	if h == (hook{}) {
		return ""
	}
	device := ""
	if h.device != "" {
		device = fmt.Sprintf(" device %q", h.device)
	}
	return fmt.Sprintf(" { type %s hook %s%s priority %d; policy accept; }", h.kind, h.name, device, h.prio)
}
