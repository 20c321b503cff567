package nft

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Limit is the most that may leave with an egress IP. The zero Limit: there is none.
//
// The kernel's token bucket holds a second of the rate and, on top, the burst of the object (linux: nft_limit_init): it
// lets no burst be smaller than that second. So a sender that was idle gets a tenth more in its first ten seconds. And
// a packet that is cut up only by the network card counts with one header. The kernel therefore gets a rate that is
// lower by a 32nd: the first ten seconds come out 6% above Rate, what follows 3% below.
type Limit struct {
	Rate  uint64 // bytes per second
	Burst uint64 // bytes that may leave at once; less than a second of Rate is taken for that second
}

// objectLimit is a limit (enum in linux/netfilter/nf_tables.h).
const objectLimit = objectKind(nftables.ObjTypeLimit)

// NFT_LIMIT_PKT_BYTES and NFT_LIMIT_F_INV of linux/netfilter/nf_tables.h: bytes are counted, and a rule goes on when
// there are too many.
const (
	limitBytes  = 1
	limitInvert = 1
)

// maxRate keeps the kernel from an overflow: it multiplies rate and burst by the nanoseconds of a second.
const maxRate = math.MaxUint64/1_000_000_000 - math.MaxUint32

// value returns the limit as the value of an element: rate and burst of the kernel's object.
func (l Limit) value() string {
	rate := min(max(l.Rate-l.Rate/32, 1), maxRate) // the kernel refuses 0
	return limitValue(rate, uint32(min(max(l.Burst, rate)-rate, math.MaxUint32)))
}

func limitValue(rate uint64, burst uint32) string {
	return string(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, rate), burst))
}

// limitName returns the name of the object that the element with that key, a connection mark, refers to.
func limitName(key string) string {
	return fmt.Sprint("egress_", uint32(markOf(key)&egress.Mark(egress.MaxID)))
}

// decodeLimit returns the limit that an object is, as a value; "" when it is of another form than ours.
func decodeLimit(data []byte) (string, error) {
	a, err := decode(data)
	if err != nil {
		return "", err
	}
	if a.uint32(unix.NFTA_LIMIT_TYPE) != limitBytes || a.uint32(unix.NFTA_LIMIT_FLAGS) != limitInvert || a.uint64(unix.NFTA_LIMIT_UNIT) != 1 {
		return "", nil
	}
	return limitValue(a.uint64(unix.NFTA_LIMIT_RATE), a.uint32(unix.NFTA_LIMIT_BURST)), nil
}

func (t table) addLimit(name, value string) op {
	rate, burst := binary.BigEndian.Uint64([]byte(value)), binary.BigEndian.Uint32([]byte(value[8:]))
	line := fmt.Sprintf("add limit %s %s { rate over %d bytes/second burst %d bytes; }", t.id(), name, rate, burst)
	return t.newOp(line, unix.NFT_MSG_NEWOBJ, netlink.Create, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_OBJ_TABLE, t.name)
		e.String(unix.NFTA_OBJ_NAME, name)
		e.Uint32(unix.NFTA_OBJ_TYPE, uint32(objectLimit))
		e.Nested(unix.NFTA_OBJ_DATA, always(func(e *netlink.AttributeEncoder) {
			e.Uint64(unix.NFTA_LIMIT_RATE, rate)
			e.Uint64(unix.NFTA_LIMIT_UNIT, 1)
			e.Uint32(unix.NFTA_LIMIT_BURST, burst)
			e.Uint32(unix.NFTA_LIMIT_TYPE, limitBytes)
			e.Uint32(unix.NFTA_LIMIT_FLAGS, limitInvert)
		}))
	})
}

// changeLimits returns what turns the elements of a map of limits from old into wanted. An object cannot be changed,
// nor removed while an element refers to it: elements that go, objects that go, objects that come, elements that come.
func (t table) changeLimits(s set, have observedTable, wanted elements) []op {
	old := have.elements[s.name]
	wanted = maps.Clone(wanted)
	maps.DeleteFunc(wanted, func(_, v string) bool { return v == "" }) // kept, and none of ours
	stay := elements{}
	names := map[string]bool{}
	for k, v := range wanted {
		if v == old[k] {
			stay[k], names[limitName(k)] = v, true
		}
	}
	ops := t.change(s, old, stay)
	for _, name := range slices.Sorted(maps.Keys(have.limits)) {
		if !names[name] {
			ops = append(ops, t.deleteObject(name, objectLimit))
		}
	}
	for _, k := range slices.Sorted(maps.Keys(wanted)) {
		if name := limitName(k); !names[name] {
			ops = append(ops, t.addLimit(name, wanted[k]))
		}
	}
	return append(ops, t.change(s, stay, wanted)...)
}

// The attributes of a shift (enums nft_bitwise_attributes and nft_bitwise_ops of linux/netfilter/nf_tables.h).
const (
	bitwiseOp        = 6 // NFTA_BITWISE_OP
	bitwiseData      = 7 // NFTA_BITWISE_DATA
	bitwiseLeftShift = 1 // NFT_BITWISE_LSHIFT
)

// objectMap looks an object up in a map and applies it; the rule ends there when there is none. Package expr has
// objects by name only.
type objectMap struct {
	expr.Any // none; for its unexported methods
	set      string
}

// forward sends the packet out of the link whose index is in the register. Package expr has no such expression.
type forward struct {
	expr.Any // none; for its unexported methods
}

// shiftLeft multiplies the four bytes in the register, in host byte order, by a power of two. Package expr has no
// shift.
type shiftLeft struct {
	expr.Any // as above
	bits     uint32
}

// connSource loads the address of who sends in one direction of a connection. Package expr knows the key of neither
// family.
type connSource struct {
	expr.Any  // as above
	key       uint32
	direction uint8
}

// The directions of a connection (IP_CT_DIR_*, linux/netfilter/nf_conntrack_tuple_common.h).
const (
	original uint8 = iota
	reply
)

// setSource writes the address of who sent a packet. Package expr has no checksum of ICMPv6, which covers it.
type setSource struct {
	expr.Any // as above
	f        family
}

// marshal encodes an expression.
func marshal(family byte, x expr.Any) ([]byte, error) {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	data := func(name string, fill func(*netlink.AttributeEncoder)) ([]byte, error) {
		e.String(unix.NFTA_EXPR_NAME, name)
		e.Nested(unix.NFTA_EXPR_DATA, always(fill))
		return e.Encode()
	}
	switch x := x.(type) {
	case objectMap:
		return data("objref", func(e *netlink.AttributeEncoder) {
			e.Uint32(unix.NFTA_OBJREF_SET_SREG, reg)
			e.String(unix.NFTA_OBJREF_SET_NAME, x.set)
		})
	case forward:
		return data("fwd", func(e *netlink.AttributeEncoder) { e.Uint32(unix.NFTA_FWD_SREG_DEV, reg) })
	case shiftLeft:
		return data("bitwise", func(e *netlink.AttributeEncoder) {
			e.Uint32(unix.NFTA_BITWISE_SREG, reg)
			e.Uint32(unix.NFTA_BITWISE_DREG, reg)
			e.Uint32(unix.NFTA_BITWISE_LEN, 4)
			e.Uint32(bitwiseOp, bitwiseLeftShift)
			e.Nested(bitwiseData, always(func(e *netlink.AttributeEncoder) { e.Bytes(unix.NFTA_DATA_VALUE, native(x.bits)) }))
		})
	case connSource:
		return data("ct", func(e *netlink.AttributeEncoder) {
			e.Uint32(unix.NFTA_CT_KEY, x.key)
			e.Uint32(unix.NFTA_CT_DREG, reg)
			e.Uint8(unix.NFTA_CT_DIRECTION, x.direction)
		})
	case setSource:
		return data("payload", func(e *netlink.AttributeEncoder) {
			e.Uint32(unix.NFTA_PAYLOAD_SREG, reg)
			e.Uint32(unix.NFTA_PAYLOAD_BASE, unix.NFT_PAYLOAD_NETWORK_HEADER)
			e.Uint32(unix.NFTA_PAYLOAD_OFFSET, x.f.source)
			e.Uint32(unix.NFTA_PAYLOAD_LEN, x.f.address.Bytes)
			if x.f.number == unix.NFPROTO_IPV4 { // the header has one, too (RFC 791, section 3.1)
				e.Uint32(unix.NFTA_PAYLOAD_CSUM_TYPE, unix.NFT_PAYLOAD_CSUM_INET)
				e.Uint32(unix.NFTA_PAYLOAD_CSUM_OFFSET, 10)
			}
			e.Uint32(unix.NFTA_PAYLOAD_CSUM_FLAGS, unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR)
		})
	}
	return expr.Marshal(family, x)
}

// markSource is the mark that says which egress IP a packet is of: that of its connection, or its own.
type markSource struct {
	words string
	load  expr.Any
}

var (
	markOfConnection = markSource{"ct mark", loadCt(expr.CtKeyMARK)}
	markOfPacket     = markSource{"meta mark", loadMeta(expr.MetaKeyMARK)}
)

// overLimit matches what is too much for the egress IP.
func overLimit(of markSource, set string) term {
	return words("limit name "+of.words+" map @"+set, of.load, objectMap{set: set})
}
