package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// TraceTable is the table by whose rules the kernel traces packets. Its socket owns it: it goes with the process at the
// latest.
const TraceTable = egress.TraceTableName

// ErrNoTrace says that the kernel has no tables that go with their owner (Linux 5.12), so that nothing is traced.
var ErrNoTrace = errors.New("the kernel has no nftables tables that go with their owner, as Linux 5.12 has: a trace could outlive its agent")

// ErrTracing says that packets are traced already.
var ErrTracing = errors.New("another trace is running: there is a table " + TraceTable)

// Flow is what is traced: packets from one of the sources to a destination, what comes back, and both in the overlay.
// Of TCP those alone by which a connection begins, or is refused: SYN, SYN+ACK and RST.
type Flow struct {
	Sources     []netip.Addr // all of the destination's family
	Destination netip.Addr
	Protocol    byte
	Port        uint16 // of the destination, TCP's or UDP's; 0: any
}

// The chains of TraceTable: what a packet is that a rule there matches.
const (
	traceSent   = "sent"       // from a source to the destination
	traceBack   = "back"       // the other way
	traceOuter  = "tunnel_in"  // either, as it comes in by the overlay
	traceOuters = "tunnel_out" // either, as it goes into the overlay
)

// tracePriority comes before the chains of anybody (linux: NF_IP_PRI_RAW_BEFORE_DEFRAG is -450).
const tracePriority = -500

// traceRate bounds how many packets a second each rule traces.
const traceRate = 4

// TraceEvent is one step of a traced packet through the ruleset.
type TraceEvent struct {
	// Packet is which packet. The kernel may use a number again, and a packet that it forwards may have another one
	// from its route on.
	Packet uint32
	// Began is what the packet is, one of the chains of TraceTable, where the step is its first; empty: it is not.
	Began         string
	Family, Table string
	Chain         string
	Rule          uint64 // its handle; 0: the chain's policy
	Verdict       string // in the words of nft(8); empty: the end of a chain, whose policy comes next
	In, Out       int    // indexes of links; 0: none (yet)
	// Ends are the packet's, of the first step in a chain; the zero Ends elsewhere.
	Ends
}

// Ends are the protocol, the addresses and the ports of a packet. Both ports are the identifier of an ICMP echo; of
// others than TCP and UDP they are 0.
type Ends struct {
	Protocol         byte
	From, To         netip.Addr
	FromPort, ToPort uint16
}

// Trace has the kernel trace packets of a flow, and calls f for each step, until ctx ends or f returns false. It calls
// begun when packets are traced from then on. What it adds to the ruleset is gone in the end. It reports whether the kernel had more steps than were read, so that some are lost.
// It works in the network namespace of the calling thread.
func Trace(ctx context.Context, flow Flow, begun func(), f func(TraceEvent) bool) (lost bool, err error) {
	w, err := dial()
	if err != nil {
		return false, fmt.Errorf("opening a netlink socket: %w", err)
	}
	defer func() { err = errors.Join(err, w.Close()) }() // and with it goes the table
	events, err := dial()
	if err != nil {
		return false, fmt.Errorf("opening a netlink socket: %w", err)
	}
	defer func() { err = errors.Join(err, events.Close()) }()
	if err := events.JoinGroup(unix.NFNLGRP_NFTRACE); err != nil {
		return false, fmt.Errorf("joining the nftrace group: %w", err)
	}
	t := traceTable(flow)
	ops := []op{t.addTable()}
	ops[0].msgs[0].Header.Flags |= netlink.Excl
	for _, c := range t.chains {
		ops = append(ops, t.addChain(c))
		for _, r := range c.rules {
			ops = append(ops, t.addRule(c.name, r, 1))
		}
	}
	out := &writer{nl: w}
	// the table alone, which is not added yet: other parts are refused for other reasons
	switch err := out.send(ops[:1], false); {
	case errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL):
		return false, ErrNoTrace
	case errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EBUSY):
		return false, ErrTracing
	case err != nil:
		return false, fmt.Errorf("adding table %s: %w", t.id(), err)
	}
	if err := out.commit(ops); err != nil {
		return false, fmt.Errorf("adding table %s: %w", t.id(), err)
	}
	begun()
	stop := context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) }) // ends the blocked read
	defer stop()
	for {
		msgs, err := events.Receive()
		switch {
		case ctx.Err() != nil:
			return lost, nil
		case errors.Is(err, unix.ENOBUFS):
			lost = true
			continue
		case err != nil:
			return lost, fmt.Errorf("reading traces: %w", err)
		}
		for _, m := range msgs {
			if e, ok := decodeTrace(m); ok && !f(e) {
				return lost, nil
			}
		}
	}
}

// traceTable returns the table that traces a flow.
func traceTable(flow Flow) table {
	t := table{family: nftables.TableFamilyINet, name: TraceTable, flags: flagOwner}
	f, destination, ok := familyOf(flow.Destination)
	if !ok {
		return t
	}
	pre := hook{nftables.ChainTypeFilter, "prerouting", *nftables.ChainHookPrerouting, tracePriority, ""}
	out := hook{nftables.ChainTypeFilter, "output", *nftables.ChainHookOutput, tracePriority, ""}
	sent, back := chain{name: traceSent, hook: pre}, chain{name: traceBack, hook: pre}
	in, outs := chain{name: traceOuter, hook: pre}, chain{name: traceOuters, hook: out}
	for _, ip := range flow.Sources {
		source := ip.Unmap()
		there := f.packet(expr.PayloadBaseNetworkHeader, 0, source, destination, flow.Protocol, 2, flow.Port, tcpFlagSYN)
		here := f.packet(expr.PayloadBaseNetworkHeader, 0, destination, source, flow.Protocol, 0, flow.Port, tcpFlagSYN|tcpFlagRST)
		sent.rules = append(sent.rules, newRule(sent.name, ofFamily(f), there, traced()))
		back.rules = append(back.rules, newRule(back.name, ofFamily(f), here, traced()))
		// A UDP header, that of VXLAN and an Ethernet one come before the packet in the overlay.
		const inner = 8 + 8 + 14
		there = f.packet(expr.PayloadBaseTransportHeader, inner, source, destination, flow.Protocol, 2, flow.Port, tcpFlagSYN)
		here = f.packet(expr.PayloadBaseTransportHeader, inner, destination, source, flow.Protocol, 0, flow.Port, tcpFlagSYN|tcpFlagRST)
		for _, c := range []*chain{&in, &outs} {
			for _, inner := range []term{there, here} {
				c.rules = append(c.rules, newRule(c.name, udpTo(egress.OverlayPort), inner, traced()))
			}
		}
	}
	t.chains = []chain{sent, back, in, outs}
	return t
}

// The flags of a TCP header (RFC 9293, section 3.1).
const tcpFlagSYN, tcpFlagRST = 2, 4

// packet matches a packet, whose header begins at an offset from a base, by addresses, protocol and a port that is 0 or
// 2 bytes into the header of the transport; port 0: any. One of TCP has one of flags.
func (f family) packet(base expr.PayloadBase, offset uint32, from, to netip.Addr, protocol byte, at uint32, port uint16, flags byte) term {
	length, next := uint32(20), uint32(9) // of IPv4, without options (RFC 791)
	if f.number == unix.NFPROTO_IPV6 {
		length, next = 40, 6 // without extensions (RFC 8200)
	}
	words := fmt.Sprintf("%s saddr %s daddr %s protocol %d port %d at %d", f.name, from, to, protocol, port, offset)
	exprs := []expr.Any{
		load(base, offset+f.source, f.address.Bytes), equals(from.AsSlice()...),
		load(base, offset+f.source+f.address.Bytes, f.address.Bytes), equals(to.AsSlice()...),
		load(base, offset+next, 1), equals(protocol),
	}
	if base == expr.PayloadBaseNetworkHeader {
		base, offset = expr.PayloadBaseTransportHeader, 0
	} else {
		offset += length
	}
	if port != 0 {
		exprs = append(exprs, load(base, offset+at, 2), equals(binary.BigEndian.AppendUint16(nil, port)...))
	}
	if protocol == unix.IPPROTO_TCP {
		words += fmt.Sprintf(" flags %d", flags)
		exprs = append(exprs, load(base, offset+13, 1),
			&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 1, Mask: []byte{flags}, Xor: []byte{0}}, differs(0))
	}
	return term{words: words, exprs: exprs}
}

// traced has what a rule matches traced, as often as traceRate says.
func traced() term {
	return words(fmt.Sprintf("limit rate %d/second burst %[1]d packets meta nftrace set 1", traceRate),
		&expr.Limit{Type: expr.LimitTypePkts, Rate: traceRate, Unit: expr.LimitTimeSecond, Burst: traceRate},
		&expr.Immediate{Register: reg, Data: []byte{1}}, setMeta(expr.MetaKeyNFTRACE))
}

// decodeTrace reads an event of the kernel (linux: nft_trace_notify); false: it is none, or cannot be read.
func decodeTrace(m netlink.Message) (e TraceEvent, ok bool) {
	if m.Header.Type != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_TRACE || len(m.Data) < 4 {
		return e, false
	}
	a, err := decode(m.Data[4:])
	if err != nil {
		return e, false
	}
	e = TraceEvent{Packet: a.uint32(unix.NFTA_TRACE_ID), Family: familyName(m.Data[0]), Table: a.string(unix.NFTA_TRACE_TABLE),
		Chain: a.string(unix.NFTA_TRACE_CHAIN), Rule: a.uint64(unix.NFTA_TRACE_RULE_HANDLE),
		In: int(a.uint32(unix.NFTA_TRACE_IIF)), Out: int(a.uint32(unix.NFTA_TRACE_OIF))}
	e.Ends = endsOf(a[unix.NFTA_TRACE_NETWORK_HEADER], a[unix.NFTA_TRACE_TRANSPORT_HEADER])
	if b, there := a[unix.NFTA_TRACE_POLICY]; there && len(b) == 4 {
		e.Verdict = verdictName(int32(binary.BigEndian.Uint32(b)), "")
	} else {
		v, err := decode(a[unix.NFTA_TRACE_VERDICT])
		if err != nil || len(v[unix.NFTA_VERDICT_CODE]) != 4 {
			return e, false
		}
		e.Verdict = verdictName(int32(v.uint32(unix.NFTA_VERDICT_CODE)), v.string(unix.NFTA_VERDICT_CHAIN))
	}
	if e.Rule == 0 && (e.Verdict == "continue" || e.Verdict == "return") {
		e.Verdict = ""
	}
	if e.Table == TraceTable && e.Rule != 0 {
		e.Began = e.Chain
	}
	return e, true
}

// endsOf reads the headers of a packet, of network and transport, which may be cut off; the zero Ends: there are none.
func endsOf(network, transport []byte) (e Ends) {
	switch b := network; {
	case len(b) >= 20 && b[0]>>4 == 4:
		e = Ends{Protocol: b[9], From: netip.AddrFrom4([4]byte(b[12:16])), To: netip.AddrFrom4([4]byte(b[16:20]))}
	case len(b) >= 40 && b[0]>>4 == 6: // of one with extensions the protocol is not the transport's
		e = Ends{Protocol: b[6], From: netip.AddrFrom16([16]byte(b[8:24])), To: netip.AddrFrom16([16]byte(b[24:40]))}
	}
	if len(transport) < 8 {
		return e
	}
	switch kind := transport[0]; e.Protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		e.FromPort, e.ToPort = binary.BigEndian.Uint16(transport), binary.BigEndian.Uint16(transport[2:])
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		// echo, and its reply
		if e.Protocol == unix.IPPROTO_ICMP && (kind == 8 || kind == 0) || e.Protocol == unix.IPPROTO_ICMPV6 && (kind == 128 || kind == 129) {
			e.FromPort = binary.BigEndian.Uint16(transport[4:])
			e.ToPort = e.FromPort
		}
	}
	return e
}

// familyName returns the name of a family of tables.
func familyName(n byte) string {
	switch nftables.TableFamily(n) {
	case nftables.TableFamilyINet:
		return "inet"
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyARP:
		return "arp"
	case nftables.TableFamilyNetdev:
		return "netdev"
	case nftables.TableFamilyBridge:
		return "bridge"
	}
	return fmt.Sprint(n)
}

// verdictName returns a verdict in the words of nft(8) (linux: enum nft_verdicts, uapi/linux/netfilter.h).
func verdictName(code int32, to string) string {
	switch code {
	case unix.NFT_CONTINUE:
		return "continue"
	case unix.NFT_BREAK:
		return "break"
	case unix.NFT_JUMP:
		return "jump " + to
	case unix.NFT_GOTO:
		return "goto " + to
	case unix.NFT_RETURN:
		return "return"
	}
	switch code & 0xff { // a queue's number, and the error of a drop, are above
	case 0:
		return "drop"
	case 1:
		return "accept"
	case 2:
		return "stolen"
	case 3:
		return "queue"
	}
	return fmt.Sprint(code)
}
