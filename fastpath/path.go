package fastpath

import (
	"bytes"
	"cmp"
	_ "embed" // the object
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

//go:embed fast.o
var object []byte

// Path is the fast path of a network namespace. Its methods may be used at once, but for Observe and Apply, which
// belong to one goroutine, as Detach does. A nil Path is one that is off: Close, Detach, Pause, Permit, Revoke, Steps
// and Traffic do nothing.
type Path struct {
	coll  *ebpf.Collection
	cpus  int
	links map[attachment]link.Link // of Observe and Apply

	mu     sync.Mutex // guards what follows
	pauses int
}

// loopback has this index in every network namespace.
const loopback = 1

// ErrKernel says that the kernel, or the process, lacks what the fast path needs; what that is, is with it.
var ErrKernel = errors.New("the fast path needs Linux 6.6 or later, with BPF, and CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN")

// New loads the programs, which are attached by Apply. The error is ErrKernel where that cannot be done.
func New() (*Path, error) {
	_, err := link.QueryPrograms(link.QueryOptions{Target: loopback, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		return nil, fmt.Errorf("%w: asking for programs (tcx): %w", ErrKernel, err)
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("reading the programs of the fast path: %w", err)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("%w: loading the programs: %w", ErrKernel, err)
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		coll.Close()
		return nil, fmt.Errorf("counting CPUs: %w", err)
	}
	return &Path{coll: coll, cpus: cpus, links: map[attachment]link.Link{}}, nil
}

// Close detaches the programs. What they did is the tables' from then on.
func (p *Path) Close() error {
	if p == nil {
		return nil
	}
	err := p.Detach()
	p.coll.Close()
	return err
}

// Detach takes the programs off their links at once, whatever their maps hold, until Apply attaches them again.
func (p *Path) Detach() error {
	if p == nil {
		return nil
	}
	var errs []error
	for at := range p.links {
		errs = append(errs, p.detach(at))
	}
	return errors.Join(errs...)
}

// Pause leaves all packets to the tables, as for who traces them there, until resume is called, once.
func (p *Path) Pause() (resume func() error, err error) {
	if p == nil {
		return func() error { return nil }, nil
	}
	if err := p.pause(1); err != nil {
		return nil, err
	}
	return func() error { return p.pause(-1) }, nil
}

func (p *Path) pause(n int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	off := uint32(0)
	if p.pauses+n > 0 {
		off = 1
	}
	if err := p.coll.Maps["paused"].Put(uint32(0), off); err != nil {
		return fmt.Errorf("pausing the fast path: %w", err)
	}
	p.pauses += n
	return nil
}

// Observed is what was read of a Path.
type Observed struct {
	contents
	ipsec bool
}

// Off says why Diff lets nothing be attached, whatever is wanted; "": it does not. The programs know no IPsec policy:
// what is to be encrypted would leave as it is.
func (o Observed) Off() string {
	if o.ipsec {
		return "there are IPsec policies (ip xfrm policy), which the fast path would pass by: delete them, or do without --fast-path"
	}
	return ""
}

// Observe reads what the maps hold, and what is attached. A program is no more where its link is gone.
func (p *Path) Observe() (Observed, error) {
	have := Observed{contents: State{}.contents()}
	policies, err := netlink.XfrmPolicyList(netlink.FAMILY_ALL)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ECONNREFUSED) { // a kernel without them
		err = nil
	}
	if err != nil {
		return Observed{}, fmt.Errorf("reading IPsec policies: %w", err)
	}
	have.ipsec = len(policies) > 0
	err = p.coll.Maps["confs"].Lookup(uint32(0), &have.conf)
	errs := []error{err, dump(p.coll.Maps["units"], func(k unit, v node) { have.units[k] = v }),
		dump(p.coll.Maps["peers"], func(k uint64, v peer) { have.peers[k] = v.Underlay })}
	var ip [4]byte
	var values []count
	all := p.coll.Maps["counts"].Iterate()
	for all.Next(&ip, &values) {
		have.ips[ip] = true
	}
	errs = append(errs, all.Err())
	for at, l := range p.links {
		info, err := l.Info()
		if err == nil && int(info.TCX().Ifindex) == at.link {
			have.at[at] = true
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return Observed{}, fmt.Errorf("reading the fast path: %w", err)
	}
	return have, nil
}

// dump calls f with all that a map holds.
func dump[K, V any](m *ebpf.Map, f func(K, V)) error {
	keys, values := make([]K, 1024), make([]V, 1024)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		for i := range n {
			f(keys[i], values[i])
		}
		if err != nil {
			return nil // that was all
		}
	}
}

// op changes one thing.
type op struct {
	line string
	do   func(p *Path) error
}

// Changes are what makes a Path what is wanted.
type Changes struct{ removes, adds []op }

// Removes are those that take something from the programs, Adds the others: they come before the tables change, and
// after, so that the programs never have more than the tables.
func (c Changes) Removes() Changes { return Changes{removes: c.removes} }

// Adds are those that Removes leaves out. They hold only once those were made.
func (c Changes) Adds() Changes { return Changes{adds: c.adds} }

// Empty reports whether there is nothing to change.
func (c Changes) Empty() bool { return len(c.removes)+len(c.adds) == 0 }

// String returns a line for each change, in order.
func (c Changes) String() string {
	var b strings.Builder
	for _, o := range slices.Concat(c.removes, c.adds) {
		b.WriteString(o.line + "\n")
	}
	return b.String()
}

// Diff returns what makes have hold want.
func Diff(have Observed, want State) Changes {
	var c Changes
	if have.Off() != "" {
		want = State{}
	}
	to := want.contents()
	remove := func(line string, do func(*Path) error) { c.removes = append(c.removes, op{line, do}) }
	add := func(line string, do func(*Path) error) { c.adds = append(c.adds, op{line, do}) }
	// With another configuration than that of the links that they are at, programs would be wrong: none is attached
	// then.
	renewed := have.conf != to.conf
	for _, at := range sorted(have.at, attachment.compare) {
		if renewed || !to.at[at] {
			remove("fast path detach "+at.String(), func(p *Path) error { return p.detach(at) })
		}
	}
	if renewed {
		remove("fast path configure", func(p *Path) error { return p.coll.Maps["confs"].Put(uint32(0), to.conf) })
	}
	diff("units", have.units, to.units, unit.compare, unit.String, func(_ *Path, n node) any { return n }, remove, add)
	diff("peers", have.peers, to.peers, cmp.Compare[uint64], macString,
		func(_ *Path, ip [4]byte) any { return peer{Underlay: ip} }, remove, add)
	diff("counts", have.ips, to.ips, compareIP, ipString,
		func(p *Path, _ bool) any { return make([]count, p.cpus) }, remove, add)
	for _, at := range sorted(to.at, attachment.compare) {
		if renewed || !have.at[at] {
			add("fast path attach "+at.String(), func(p *Path) error { return p.attach(at) })
		}
	}
	return c
}

// diff makes a map what it is to be. What has another value is removed first: it is somebody else's.
func diff[K, V comparable](m string, have, want map[K]V, compare func(a, b K) int, name func(K) string,
	value func(*Path, V) any, remove, add func(string, func(*Path) error)) {
	for _, k := range sorted(have, compare) {
		if v, ok := want[k]; !ok || v != have[k] {
			remove("fast path "+m+" delete "+name(k), func(p *Path) error { return absent(p.coll.Maps[m].Delete(k)) })
		}
	}
	for _, k := range sorted(want, compare) {
		if v, ok := have[k]; !ok || v != want[k] {
			add("fast path "+m+" add "+name(k), func(p *Path) error { return p.coll.Maps[m].Put(k, value(p, want[k])) })
		}
	}
}

func sorted[K comparable, V any](m map[K]V, compare func(a, b K) int) []K {
	return slices.SortedFunc(maps.Keys(m), compare)
}

// absent returns no error for what is gone already.
func absent(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

// Apply makes changes, in the network namespace of the calling thread, and goes on after what fails, but for one
// thing: where something could not be removed, nothing is added, and the programs are detached.
func (p *Path) Apply(c Changes) error {
	for i, part := range [][]op{c.removes, c.adds} {
		var errs []error
		for _, o := range part {
			if err := o.do(p); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", o.line, err))
			}
		}
		err := errors.Join(errs...)
		if err != nil && i == 0 {
			err = errors.Join(err, p.Detach())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *Path) attach(at attachment) error {
	how := ebpf.AttachTCXIngress
	if at.program == "to_overlay" {
		how = ebpf.AttachTCXEgress
	}
	_ = p.detach(at) // of a link that is gone, whose index is another's now
	l, err := link.AttachTCX(link.TCXOptions{Interface: at.link, Program: p.coll.Programs[at.program], Attach: how})
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("the link is gone: %w", err)
	}
	if err != nil {
		return err
	}
	p.links[at] = l
	return nil
}

func (p *Path) detach(at attachment) error {
	l, ok := p.links[at]
	if !ok {
		return nil
	}
	delete(p.links, at)
	return l.Close()
}

// Traffic is what the programs have sent on by an egress IP of this node, since it has been its gateway. Bytes are
// those of the IP packet.
type Traffic struct{ SentPackets, SentBytes, ReceivedPackets, ReceivedBytes uint64 }

// Traffic returns what has passed by each egress IP.
func (p *Path) Traffic() (map[netip.Addr]Traffic, error) {
	out := map[netip.Addr]Traffic{}
	if p == nil {
		return out, nil
	}
	var ip [4]byte
	var values []count
	all := p.coll.Maps["counts"].Iterate()
	for all.Next(&ip, &values) {
		var t Traffic
		for _, v := range values {
			t.SentPackets, t.SentBytes = t.SentPackets+v.Sent, t.SentBytes+v.SentBytes
			t.ReceivedPackets, t.ReceivedBytes = t.ReceivedPackets+v.Received, t.ReceivedBytes+v.ReceivedBytes
		}
		out[netip.AddrFrom4(ip)] = t
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("reading what has passed by the fast path: %w", err)
	}
	return out, nil
}

// Steps is how many packets the programs have taken.
type Steps struct {
	Forwarded uint64 // from another node to the uplink
	Wrapped   uint64 // to another node
	Unwrapped uint64 // from another node into the overlay link
	Failed    uint64 // dropped, as the kernel could not do what it was asked for halfway
}

// Steps returns how many packets the programs have taken, of all links.
func (p *Path) Steps() (Steps, error) {
	var n [4]uint64
	if p == nil {
		return Steps{}, nil
	}
	for i := range n {
		var values []uint64
		if err := p.coll.Maps["steps"].Lookup(uint32(i), &values); err != nil {
			return Steps{}, fmt.Errorf("reading what the fast path did: %w", err)
		}
		for _, v := range values {
			n[i] += v
		}
	}
	return Steps{n[0], n[1], n[2], n[3]}, nil
}
