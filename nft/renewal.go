package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// The permits of a table end together, by a clock: an element of its set `alive` that ends by itself. So renewing them
// takes no commit, which would make everybody who reads the ruleset begin again: a frame of the agent's own, on `lo`,
// passes a rule that gives the element its next end. How long that is, is a constant of the rule: there is one for each
// length.
//
// The kernel may look at a frame late, as when ksoftirqd has to wait for its turn, and the end counts from then. So a
// frame renews only with a ticket: an element of the set `ticket`, which another frame has made, and which lives for
// Renewal.Window. The agent reads that the ticket is there, then the clock, and then sends the frame: that frame renews
// within Window of the clock, or never, also when the process or the kernel is delayed meanwhile.

// tick is the longest that a kernel's tick is (HZ=100). It keeps times in ticks, rounded down.
const tick = 10 * time.Millisecond

// Renewal says how permits are renewed without a commit. The zero Renewal: not at all. All times are whole ticks.
type Renewal struct {
	Window  time.Duration   // how long a ticket lives
	Lengths []time.Duration // what permits can be made to last, ascending
}

// NewRenewal returns a Renewal for permits of a length, and for those that end with a lease. Its lengths are the
// sixteenths of both, so permits may end up to a sixteenth early. It is the zero Renewal where permits are too short
// for it.
func NewRenewal(permit, lease time.Duration) Renewal {
	r := Renewal{Window: (permit / 20).Truncate(tick)} // half of the tenth that is left for writing
	if r.Window < tick {
		return Renewal{}
	}
	for _, whole := range []time.Duration{permit, lease} {
		for i := range time.Duration(16) {
			if d := ((i + 1) * whole / 16).Truncate(tick); d >= tick && d/tick <= lengthMax {
				r.Lengths = append(r.Lengths, d)
			}
		}
	}
	slices.Sort(r.Lengths)
	r.Lengths = slices.Compact(r.Lengths)
	return r
}

// longest returns the longest length that is not above d; 0: there is none.
func (r Renewal) longest(d time.Duration) time.Duration {
	i, found := slices.BinarySearch(r.Lengths, d)
	if found {
		return d
	}
	if i == 0 {
		return 0
	}
	return r.Lengths[i-1]
}

// The mark of a frame has egress.RenewalMark; a bit that says whether it renews or makes a ticket; the time, in ticks;
// and the number of the ticket. So rules of a former agent, with other times, do not match it.
const (
	renews     egress.Mark = 1 << 23
	lengthMask egress.Mark = 0x1fff << lengthBit
	lengthBit              = 10
	lengthMax              = 0x1fff
	ticketMask egress.Mark = 1<<lengthBit - 1
)

func renewalMark(kind egress.Mark, d time.Duration, ticket egress.Mark) egress.Mark {
	return egress.RenewalMark | kind | egress.Mark(d/tick)<<lengthBit | ticket&ticketMask
}

// The protocols of Ethernet, as the kernel has them in a packet.
var (
	etherARP  = string(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ARP))
	etherIPv4 = string(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP))
	etherIPv6 = string(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IPV6))
	protocols = map[string]string{etherARP: "arp", etherIPv4: "ip", etherIPv6: "ip6"}
)

// clock names an element of a set alive.
type clock struct {
	family nftables.TableFamily
	ether  string
}

func (c clock) table() table { return table{family: c.family, name: egress.TableName} }

// set gives the clock a new end, d from now, in a transaction. Adding an element that is there does not extend it on
// every kernel, and deleting one that is not there fails: so add, delete, add, of which packets see only the outcome.
func (c clock) set(d time.Duration) []op {
	names, list := []string{protocols[c.ether]}, []element{{key: c.ether, timeout: d}}
	t := c.table()
	return []op{t.addElements("alive", names, list), t.deleteElements("alive", names, []element{{key: c.ether}}), t.addElements("alive", names, list)}
}

// alive matches while the permits of the table last; ended, when they have.
func alive() term {
	return words("meta protocol @alive", loadMeta(expr.MetaKeyPROTOCOL), in("alive"))
}

func ended() term {
	return words("meta protocol != @alive", loadMeta(expr.MetaKeyPROTOCOL), notIn("alive"))
}

// renewed returns the table with the rules and sets that renew its permits.
func (t table) renewed(r Renewal) table {
	t.sets = append(t.sets,
		set{name: "alive", key: protocol, flags: flagDynamic | flagTimeout, size: 16},
		// Those that have ended stay for up to a second.
		set{name: "ticket", key: mark, flags: flagDynamic | flagTimeout, size: uint32(ticketMask) + 1})
	if r.Window < tick {
		return t
	}
	at := map[nftables.TableFamily]hook{ // in inet: from overlay_in, before conntrack and the route lookup
		nftables.TableFamilyARP:    {nftables.ChainTypeFilter, "input", 0 /* NF_ARP_IN, linux/netfilter_arp.h */, 0, ""},
		nftables.TableFamilyNetdev: {nftables.ChainTypeFilter, "ingress", *nftables.ChainHookIngress, 0, loopback},
	}[t.family]
	looped := words(fmt.Sprintf("iif %q", loopback), loadMeta(expr.MetaKeyIIF), equals(native(loopbackIndex)...))
	own := []term{looped, markIs(egress.RenewalMask, egress.RenewalMark)}
	var entries []rule
	if t.family != nftables.TableFamilyINet {
		entries = append(entries, newRule("renewal", append(own, jump("renew"))...))
	} else {
		way := &t.chains[slices.IndexFunc(t.chains, func(c chain) bool { return c.name == "overlay_in" })]
		way.rules = append(way.rules, newRule(way.name, looped, enter("renewal")))
		own = own[1:]
		// The marks of others are all kinds of numbers (Cilium's have an identity in the upper half), but not on such
		// packets.
		for _, f := range []byte{protocolOfFrames4, protocolOfFrames6} {
			own := append(own[:len(own):len(own)], words(fmt.Sprintf("meta l4proto %d", f), loadMeta(expr.MetaKeyL4PROTO), equals(f)))
			entries = append(entries, newRule("renewal", append(own, jump("renew"))...), newRule("renewal", append(own, drop())...))
		}
	}
	if t.family == nftables.TableFamilyARP { // in netdev it is on its way to another table
		entries = append(entries, newRule("renewal", append(own, drop())...))
	}
	ticket := []expr.Any{loadMeta(expr.MetaKeyMARK), mask(ticketMask, 0)}
	words4 := fmt.Sprintf("meta mark & 0x%08x", uint32(ticketMask))
	update := func(set, key string, load []expr.Any, d time.Duration) term {
		return words(fmt.Sprintf("update @%s { %s timeout %dms }", set, key, d.Milliseconds()),
			append(load, &expr.Dynset{SrcRegKey: reg, SetName: set, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: d})...)
	}
	when := func(kind egress.Mark, d time.Duration) term {
		return markIs(renews|lengthMask, renewalMark(kind, d, 0)&^egress.RenewalMask)
	}
	rules := []rule{
		newRule("renew", when(0, r.Window), update("ticket", words4, ticket, r.Window), back()),
		newRule("renew", words(words4+" != @ticket", append(ticket, notIn("ticket"))...), back()),
	}
	for _, d := range r.Lengths {
		rules = append(rules, newRule("renew", when(renews, d), update("alive", "meta protocol", []expr.Any{loadMeta(expr.MetaKeyPROTOCOL)}, d), back()))
	}
	t.chains = append(t.chains, chain{"renew", hook{}, rules}, chain{"renewal", at, entries})
	return t
}

func markIs(bits, value egress.Mark) term {
	return words(fmt.Sprintf("meta mark & 0x%08x == 0x%08x", uint32(bits), uint32(value)),
		loadMeta(expr.MetaKeyMARK), mask(bits, 0), equals(native(uint32(value))...))
}

// The link that the frames are sent on. It has this index in every network namespace.
const (
	loopback      = "lo"
	loopbackIndex = 1
)

// errNotRenewed says that the kernel did not do in time what a frame asks for.
var errNotRenewed = errors.New("the kernel did not renew the permits in time")

// Renew makes all permits that there are last as long as left says, rounded down to one of the Lengths, and returns
// when they end. It makes no commit. list are those permits: an address family that has none is left out. left is asked
// when there is a ticket; the permits end by Window after what it says, also where the kernel, or this process, takes
// its time, and when Renew fails.
func (t *Tables) Renew(r Renewal, list []Permit, left func() (time.Duration, error)) (ends time.Time, err error) {
	var clocks []clock
	for _, f := range families {
		if slices.ContainsFunc(list, func(p Permit) bool { have, _, ok := familyOf(p.IP); return ok && have.digit == f.digit }) {
			clocks = append(clocks, f.clocks...)
		}
	}
	if r.Window < tick || len(clocks) == 0 {
		return ends, errNotRenewed
	}
	t.renew.Lock()
	defer t.renew.Unlock()
	// One ticket for each frame: that it is there means that this frame was seen.
	tickets := map[string]egress.Mark{}
	for _, c := range clocks {
		if _, ok := tickets[c.ether]; !ok {
			t.ticket++
			tickets[c.ether] = t.ticket & ticketMask
		}
	}
	send := func(kind egress.Mark, d time.Duration) error {
		for ether, ticket := range tickets {
			if err := t.frames.send(ether, renewalMark(kind, d, ticket)); err != nil {
				return fmt.Errorf("sending a frame that renews permits: %w", err)
			}
		}
		return nil
	}
	if err := send(0, r.Window); err != nil {
		return ends, err
	}
	if _, err := t.await(clocks, r.Window, "ticket", func(c clock) string { return string(native(uint32(tickets[c.ether]))) }, 1, r.Window); err != nil {
		return ends, err
	}
	d, err := left()
	if err != nil {
		return ends, err
	}
	if d = r.longest(d); d == 0 {
		return ends, errNotRenewed
	}
	if err := send(renews, d); err != nil {
		return ends, err
	}
	return t.await(clocks, r.Window, "alive", func(c clock) string { return c.ether }, d-r.Window-2*tick, d)
}

// await reads an element of the set in each clock's table until it is there and lasts for least to most, and returns
// when the first of them ends; for a window at most.
func (t *Tables) await(clocks []clock, window time.Duration, set string, key func(clock) string, least, most time.Duration) (ends time.Time, err error) {
	timeout := time.NewTimer(window)
	defer timeout.Stop()
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for {
		now, shortest, longest := time.Now(), most, time.Duration(0)
		for _, c := range clocks {
			left, err := t.left(c.table(), set, key(c))
			if err != nil {
				return ends, fmt.Errorf("reading whether the permits are renewed: %w", err)
			}
			shortest, longest = min(shortest, left), max(longest, left)
		}
		if shortest > 0 && shortest >= least && longest <= most {
			return now.Add(shortest), nil
		}
		select {
		case <-timeout.C:
			return ends, errNotRenewed
		case <-again.C:
		}
	}
}

// left returns how long an element lasts; 0: it is not there.
func (t *Tables) left(in table, set, key string) (time.Duration, error) {
	q, err := request(unix.NFT_MSG_GETSETELEM, in.family, 0, func(e *netlink.AttributeEncoder) { in.encodeElements(e, set, 0, []element{{key: key}}) })
	if err != nil {
		return 0, err
	}
	msgs, err := t.clock.execute(q, 0)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	var left time.Duration
	for _, m := range msgs {
		err = each(m[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, b []byte) error {
			e, err := decodeElement(b)
			left = e.left
			return err
		})
	}
	return left, err
}

// frames is a socket that sends frames on lo.
type frames int

func openFrames() (frames, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // 0: receives nothing
	return frames(fd), err
}

func (f frames) close() error { return unix.Close(int(f)) }

// send sends the least that the kernel takes for a packet of the protocol, with a mark. It may be dropped where it
// ends.
func (f frames) send(ether string, m egress.Mark) error {
	if err := unix.SetsockoptInt(int(f), unix.SOL_SOCKET, unix.SO_MARK, int(m)); err != nil {
		return err
	}
	to := &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16([]byte(ether)), Ifindex: loopbackIndex}
	return unix.Sendto(int(f), append(append(make([]byte, 12), ether...), packets[ether]...), 0, to)
}

// The protocols of the frames in IP: one for experiments (RFC 3692), and that of no next header (RFC 8200, section
// 4.7).
const protocolOfFrames4, protocolOfFrames6 = 253, 59

// packets are a packet of each protocol that no host takes in: an ARP request without addresses, and IP headers without
// payload.
var packets = map[string][]byte{
	etherARP:  append([]byte{0, 1, 8, 0, 6, 4, 0, 1}, make([]byte, 20)...),
	etherIPv4: {0x45, 0, 0, 20, 0, 0, 0, 0, 1, protocolOfFrames4, 0xba, 0xeb, 127, 0, 0, 1, 127, 0, 0, 1},
	etherIPv6: slices.Concat([]byte{0x60, 0, 0, 0, 0, 0, protocolOfFrames6, 1},
		netip.IPv6Loopback().AsSlice(), netip.IPv6Loopback().AsSlice()),
}
