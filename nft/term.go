package nft

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// A term is one part of a rule, in the words of nft(8) and in those of the kernel. What nft makes of the words can be
// seen with `nft --debug=netlink`; a test feeds the words to nft and compares.
type term struct {
	words string
	exprs []expr.Any
	sets  []anonymousSet // that lookups of exprs are in, in their order
}

// anonymousSet is a set that belongs to a rule.
type anonymousSet struct {
	kind     kind
	elements []element
}

// rule is one rule of a chain.
type rule struct {
	words string
	exprs []expr.Any
	sets  []anonymousSet // as in term
	tag   string
}

// tagType is the type of the entry in the user data of a rule that holds its tag. nft(8) knows 0 (comment) and 1, and
// skips others.
const tagType = 0xe9

func newRule(chain string, terms ...term) rule {
	var r rule
	var words []string
	for _, t := range terms {
		words = append(words, t.words)
		r.exprs = append(r.exprs, t.exprs...)
		r.sets = append(r.sets, t.sets...)
	}
	r.words = strings.Join(words, " ")
	h := sha256.New()
	io.WriteString(h, chain+": "+r.words) // a Hash never fails
	for _, e := range r.exprs {
		b, err := marshal(unix.NFPROTO_INET, e)
		fmt.Fprintf(h, "%T %x %v\n", e, b, err)
	}
	r.tag = hex.EncodeToString(h.Sum(nil)[:8])
	return r
}

// family is what differs between IPv4 and IPv6.
type family struct {
	name     string // as nft has it
	digit    string // the last letter of the names of its sets
	protocol string // the value of meta nfproto
	number   byte   // NFPROTO_*
	source   uint32 // offset of the source address in the header
	icmp     string
	icmpNum  byte
	icmpOut  string // the chain for ICMP of the node itself
	headers  int    // bytes of an IP and a TCP header without options: an MTU without them is the MSS
	address  kind
	peer     kind
	linked   kind // an address and its link
	via      kind // who a packet is from, and by which link it comes
	came     kind
	sender   kind
	unit     kind
	origin   kind
	block    kind
	answer   []permitSet // of the permits to answer ARP or NDP
	clocks   []clock     // by which the permits end, first that to send
}

var (
	ipv4 = family{"ip", "4", "ipv4", unix.NFPROTO_IPV4, 12, "icmp", unix.IPPROTO_ICMP, "errors", 20 + 20, address4, peer4, linked4, via4, came4, sender4, unit4, origin4, block4,
		[]permitSet{{nftables.TableFamilyARP, "permit4"}, {nftables.TableFamilyNetdev, "permit4"}},
		[]clock{{nftables.TableFamilyINet, etherIPv4}, {nftables.TableFamilyARP, etherARP}, {nftables.TableFamilyNetdev, etherARP}}}
	ipv6 = family{"ip6", "6", "ipv6", unix.NFPROTO_IPV6, 8, "ipv6-icmp", unix.IPPROTO_ICMPV6, "neighbor", 40 + 20, address6, peer6, linked6, via6, came6, sender6, unit6, origin6, block6,
		[]permitSet{{nftables.TableFamilyINet, "answer6"}},
		[]clock{{nftables.TableFamilyINet, etherIPv6}}}
	families = []family{ipv4, ipv6}
)

// familyOf returns the family of an address and the address as its sets hold it. ok is false for the zero Addr.
func familyOf(ip netip.Addr) (f family, plain netip.Addr, ok bool) {
	ip = ip.Unmap().WithZone("")
	for _, f := range families {
		if ip.BitLen() == 8*int(f.address.Bytes) {
			return f, ip, true
		}
	}
	return family{}, ip, false
}

// reg is the only register that the rules need.
const reg = unix.NFT_REG_1

func native(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

func equals(data ...byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: data} }
func differs(data ...byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: data}
}

// mask is reg = reg & and ^ xor, on four bytes in host byte order.
func mask(and, xor egress.Mark) expr.Any {
	return &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: native(uint32(and)), Xor: native(uint32(xor))}
}

func loadMeta(k expr.MetaKey) expr.Any { return &expr.Meta{Key: k, Register: reg} }
func loadCt(k expr.CtKey) expr.Any     { return &expr.Ct{Key: k, Register: reg} }
func setMeta(k expr.MetaKey) expr.Any  { return &expr.Meta{Key: k, Register: reg, SourceRegister: true} }
func setCtMark() expr.Any              { return &expr.Ct{Key: expr.CtKeyMARK, Register: reg, SourceRegister: true} }
func setMSS() expr.Any {
	// Option 2, maximum segment size: two bytes, after kind and length (RFC 9293, section 3.2).
	return &expr.Exthdr{SourceRegister: reg, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt}
}

func load(base expr.PayloadBase, offset, length uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: length}
}

func in(set string) expr.Any    { return &expr.Lookup{SourceRegister: reg, SetName: set} }
func notIn(set string) expr.Any { return &expr.Lookup{SourceRegister: reg, SetName: set, Invert: true} }
func mapped(set string) expr.Any {
	return &expr.Lookup{SourceRegister: reg, DestRegister: reg, IsDestRegSet: true, SetName: set}
}

func (f family) is() []expr.Any { return []expr.Any{loadMeta(expr.MetaKeyNFPROTO), equals(f.number)} }
func (f family) saddr() expr.Any {
	return load(expr.PayloadBaseNetworkHeader, f.source, f.address.Bytes)
}
func (f family) daddr() expr.Any {
	return load(expr.PayloadBaseNetworkHeader, f.source+f.address.Bytes, f.address.Bytes)
}

func words(w string, exprs ...expr.Any) term { return term{words: w, exprs: exprs} }

func direction(name string, value byte) term {
	return words("ct direction "+name, loadCt(expr.CtKeyDIRECTION), equals(value))
}

func ctState(names string, bits uint32) term {
	return words("ct state "+names, loadCt(expr.CtKeySTATE), mask(egress.Mark(bits), 0), differs(native(0)...))
}

// confirmed matches the packets of connections of which one has left before. Until then nothing is known of them.
func confirmed() term {
	const confirmed = 1 << 3 // IPS_CONFIRMED, linux/netfilter/nf_conntrack_common.h
	return words("ct status confirmed", loadCt(expr.CtKeySTATUS), mask(confirmed, 0), differs(native(0)...))
}

// tagged matches the packets of egress connections, by what the kernel has on the connection. A packet without
// connection never matches.
func tagged() term {
	return words(fmt.Sprintf("ct mark & 0x%08x == 0x%08x", uint32(egress.ConnTagMask), uint32(egress.ConnTag)),
		loadCt(expr.CtKeyMARK), mask(egress.ConnTagMask, 0), equals(native(uint32(egress.ConnTag))...))
}

func ofFamily(f family) term { return words("meta nfproto "+f.protocol, f.is()...) }

func saddrIn(f family, set string) term {
	return words(fmt.Sprintf("%s saddr @%s", f.name, set), append(f.is(), f.saddr(), in(set))...)
}

func daddrIn(f family, set string) term {
	return words(fmt.Sprintf("%s daddr @%s", f.name, set), append(f.is(), f.daddr(), in(set))...)
}

// localType is what addrtype a destination has when the packet is for this host, or for several (RTN_*,
// linux/rtnetlink.h).
func localType() term {
	t := words("fib daddr type { local, broadcast, multicast }",
		&expr.Fib{Register: reg, ResultADDRTYPE: true, FlagDADDR: true}, in(anonymous))
	t.sets = []anonymousSet{setOf(addressType, native(unix.RTN_LOCAL), native(unix.RTN_BROADCAST), native(unix.RTN_MULTICAST))}
	return t
}

// setOf returns an anonymous set of values in the byte order of the kernel.
func setOf(k kind, values ...[]byte) anonymousSet {
	s := anonymousSet{kind: k}
	for _, v := range values {
		s.elements = append(s.elements, element{key: string(v)})
	}
	return s
}

func localDestination() term {
	return words("fib daddr type local",
		&expr.Fib{Register: reg, ResultADDRTYPE: true, FlagDADDR: true}, equals(native(unix.RTN_LOCAL)...))
}

func udpTo(port uint16) term {
	return words(fmt.Sprint("udp dport ", port), loadMeta(expr.MetaKeyL4PROTO), equals(unix.IPPROTO_UDP),
		load(expr.PayloadBaseTransportHeader, 2, 2), equals(binary.BigEndian.AppendUint16(nil, port)...))
}

func tcpSYN() term {
	return words("tcp flags syn", loadMeta(expr.MetaKeyL4PROTO), equals(unix.IPPROTO_TCP),
		load(expr.PayloadBaseTransportHeader, 13, 1),
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 1, Mask: []byte{2}, Xor: []byte{0}}, differs(0))
}

func count(name string) term {
	return words("counter name "+name, &expr.Objref{Type: int(nftables.ObjTypeCounter), Name: name})
}

func verdict(w string, kind expr.VerdictKind, chain string) term {
	return words(w+chain, &expr.Verdict{Kind: kind, Chain: chain})
}

func accept() term            { return verdict("accept", expr.VerdictAccept, "") }
func drop() term              { return verdict("drop", expr.VerdictDrop, "") }
func back() term              { return verdict("return", expr.VerdictReturn, "") }
func jump(chain string) term  { return verdict("jump ", expr.VerdictJump, chain) }
func enter(chain string) term { return verdict("goto ", expr.VerdictGoto, chain) }
func notrack() term           { return words("notrack", &expr.Notrack{}) }

func setMark(m egress.Mark) term {
	return words(fmt.Sprintf("meta mark set 0x%08x", uint32(m)), &expr.Immediate{Register: reg, Data: native(uint32(m))},
		setMeta(expr.MetaKeyMARK))
}

func markIsNot(m egress.Mark) term {
	return words(fmt.Sprintf("meta mark != 0x%08x", uint32(m)), loadMeta(expr.MetaKeyMARK), differs(native(uint32(m))...))
}

// markFromBoth sets the packet mark to what a map has for the packet mark and the connection mark together; the rule
// ends there when it has nothing. It is how two marks are compared: a map has pairs of equal ones only.
func markFromBoth(set string) term {
	return words("meta mark set meta mark . ct mark map @"+set, loadMeta(expr.MetaKeyMARK),
		&expr.Ct{Key: expr.CtKeyMARK, Register: unix.NFT_REG32_01}, mapped(set), setMeta(expr.MetaKeyMARK))
}

// podMark sets a mark to that of the source pod's egress; the rule ends there when the source is no selected pod.
func podMark(f family, what string, store expr.Any) term {
	set := "pod" + f.digit
	return words(fmt.Sprintf("%s set %s saddr map @%s", what, f.name, set), append(f.is(), f.saddr(), mapped(set), store)...)
}

// connSource loads who sends in a connection, in one of its directions: who opened it, or whom it is to.
func (f family) connSource(direction uint8) expr.Any {
	if f.number == unix.NFPROTO_IPV6 {
		return connSource{key: unix.NFT_CT_SRC_IP6, direction: direction}
	}
	return connSource{key: unix.NFT_CT_SRC_IP, direction: direction}
}

// openedTo matches the packets, both ways, of connections to somebody in the set.
func openedTo(f family, set string) term {
	return words(fmt.Sprintf("ct reply %s saddr @%s", f.name, set), f.connSource(reply), in(set))
}

// forwarded matches, in postrouting, what is not of the node itself.
func forwarded() term {
	return words("iif != 0", loadMeta(expr.MetaKeyIIF), differs(native(0)...))
}

// errorAboutPod matches an ICMP error of this node about a packet of a connection that a selected pod opened, to who
// sent it, and makes it the pod's own.
func errorAboutPod(f family) term {
	source, set := f.connSource(original), "pod"+f.digit
	return words(fmt.Sprintf("meta mark set ct original %s saddr map @%s %[1]s saddr set ct original %[1]s saddr", f.name, set),
		slices.Concat([]expr.Any{source, mapped(set), setMeta(expr.MetaKeyMARK)}, f.is(), []expr.Any{source, setSource{f: f}})...)
}

func icmpOf(f family) term {
	return words("meta l4proto "+f.icmp, loadMeta(expr.MetaKeyL4PROTO), equals(f.icmpNum))
}

// connMarkFromID tags a connection with the id that VXLAN brought as the packet mark, markFromID the packet.
func connMarkFromID() term { return fromID("ct mark", setCtMark()) }
func markFromID() term     { return fromID("meta mark", setMeta(expr.MetaKeyMARK)) }

func fromID(what string, store expr.Any) term {
	id := egress.Mark(egress.MaxID)
	return words(fmt.Sprintf("%s set meta mark & 0x%08x | 0x%08x", what, uint32(id), uint32(egress.ConnTag)),
		loadMeta(expr.MetaKeyMARK), mask(id, egress.ConnTag), store)
}

func mssOfRoute() term {
	return words("tcp option maxseg size set rt mtu", &expr.Rt{Register: reg, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: reg, DestRegister: reg, Op: expr.ByteorderHton, Len: 2, Size: 2}, setMSS())
}

func mss(bytes int) term {
	return words(fmt.Sprint("tcp option maxseg size set ", bytes),
		&expr.Immediate{Register: reg, Data: binary.BigEndian.AppendUint16(nil, uint16(bytes))}, setMSS())
}

func (f family) snat() *expr.NAT {
	return &expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.number), RegAddrMin: reg}
}

// snatFrom translates to what the map has for the connection; ports are how the source port is chosen.
func snatFrom(f family, set string, ports portChoice) term {
	line, nat := fmt.Sprintf("meta nfproto %s snat %s to ct mark map @%s", f.protocol, f.name, set), f.snat()
	if ports == randomPort {
		line, nat.FullyRandom = line+" fully-random", true
	}
	return words(line, append(f.is(), loadCt(expr.CtKeyMARK), mapped(set), nat)...)
}

// portChoice is how SNAT takes the source port.
type portChoice int

const (
	samePort portChoice = iota // the one that it was, where that is free
	randomPort
)

// The fields of an ARP packet for IPv4 over Ethernet (RFC 826), and of the frame around it: offset and length in bytes.
var (
	arpOperation = field{expr.PayloadBaseNetworkHeader, 6, 2}
	arpSenderMAC = field{expr.PayloadBaseNetworkHeader, 8, 6}
	arpSenderIP  = field{expr.PayloadBaseNetworkHeader, 14, 4}
	arpTargetMAC = field{expr.PayloadBaseNetworkHeader, 18, 6}
	arpTargetIP  = field{expr.PayloadBaseNetworkHeader, 24, 4}
	etherTo      = field{expr.PayloadBaseLLHeader, 0, 6}
	etherFrom    = field{expr.PayloadBaseLLHeader, 6, 6}
	etherType    = field{expr.PayloadBaseLLHeader, 12, 2}
	scratch      = field{expr.PayloadBaseLLHeader, 0, 4} // part of etherTo, which is written last
)

type field struct {
	base           expr.PayloadBase
	offset, length uint32
}

func (f field) load() expr.Any { return load(f.base, f.offset, f.length) }
func (f field) store() expr.Any {
	return &expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: reg, Base: f.base, Offset: f.offset, Len: f.length}
}

// set writes a constant into the field.
func (f field) set(data ...byte) []expr.Any {
	return []expr.Any{&expr.Immediate{Register: reg, Data: data}, f.store()}
}

// arpRequest matches an untagged request for an address that the link carries and that is permitted. Who asks in the
// name of such an address is not answered: it thinks that the address is its own, and what there is to say is said by
// announcements.
func arpRequest(carried, permit string) term {
	return words(fmt.Sprintf("ether type arp arp operation request iifname . arp daddr ip @%s arp daddr ip @%s arp saddr ip != @%[2]s", carried, permit),
		loadMeta(expr.MetaKeyIIFTYPE), equals(binaryutil.NativeEndian.PutUint16(unix.ARPHRD_ETHER)...),
		etherType.load(), equals(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ARP)...),
		arpOperation.load(), equals(0, 1),
		loadMeta(expr.MetaKeyIIFNAME), &expr.Payload{DestRegister: unix.NFT_REG_2, Base: arpTargetIP.base, Offset: arpTargetIP.offset, Len: arpTargetIP.length}, in(carried),
		arpTargetIP.load(), in(permit), arpSenderIP.load(), notIn(permit))
}

// arpReply turns a request into the reply that the target is at mac, to who asked.
func arpReply(mac [6]byte) term {
	copies := func(from, to field) []expr.Any { return []expr.Any{from.load(), to.store()} }
	return words(fmt.Sprintf("arp operation set reply arp daddr ether set arp saddr ether arp saddr ether set %s "+
		"@ll,0,32 set @nh,192,32 @nh,192,32 set @nh,112,32 @nh,112,32 set @ll,0,32 ether daddr set ether saddr ether saddr set %[1]s", net.HardwareAddr(mac[:])),
		slices.Concat(arpOperation.set(0, 2), copies(arpSenderMAC, arpTargetMAC), arpSenderMAC.set(mac[:]...),
			copies(arpTargetIP, scratch), copies(arpSenderIP, arpTargetIP), copies(scratch, arpSenderIP),
			copies(etherFrom, etherTo), etherFrom.set(mac[:]...))...)
}

// sendBack sends the packet out where it came in.
func sendBack() term { return words("fwd to iif", loadMeta(expr.MetaKeyIIF), forward{}) }

// expressions returns the rule's expressions for a transaction in which its anonymous sets have ids from first on.
func (r rule) expressions(first uint32) []expr.Any {
	out := make([]expr.Any, len(r.exprs))
	id := first
	for i, e := range r.exprs {
		if l, ok := e.(*expr.Lookup); ok && l.SetName == anonymous {
			with := *l
			with.SetID = id
			id++
			e = &with
		}
		out[i] = e
	}
	return out
}
