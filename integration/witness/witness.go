package witness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

// Witness watches a lab. Its methods may be called from several goroutines.
type Witness struct {
	lab          *lab.Lab
	outside, lan *lab.Sniffer
	etcd         *clientv3.Client
	end          context.CancelFunc // of follow
	done         chan struct{}

	mu       sync.Mutex // guards what follows
	bands    []*band
	tenures  map[netip.Addr][]tenure // in order
	revision int64                   // of the last owner's record in tenures
	blocks   []egress.Block          // as last read
	seen     int                     // packets of selected pods
	strange  []error
	usurped  []error
	spells   map[netip.Addr][]spell // by source address, in order
}

// spell is a time during which the packets with a source address came from one node.
type spell struct {
	node        string
	first, last time.Time
}

// band is the source ports of a selected pod, none of which is of a block of the lab. Whatever else translates keeps
// them, so a packet seen outside tells whose it is even when its source address is wrong.
type band struct {
	pod     string
	node    string                    // once that has booted
	sources map[netip.Addr]netip.Addr // destination -> expected source
	// unknown are the destinations to which the pod's node does not know the pod yet, since when. Nothing is judged
	// from then on until the first packet with the right source.
	unknown map[netip.Addr]time.Time
	// known are those first packets.
	known map[netip.Addr]lab.Packet
}

// tenure is a time during which a node owned an IP; it ends with the next one.
type tenure struct {
	node  string
	since time.Time
	why   egress.Reason
}

const (
	// queued is how much later a packet may be seen that the node had sent on before it knew the pod: it waited for its
	// neighbour's address, since the node had only just booted.
	queued    = 50 * time.Millisecond
	firstPort = 20000
	bandSize  = 100
)

// Start begins to watch; Stop ends it. The owners' records are those below /egret/.
func Start(ctx context.Context, l *lab.Lab) (*Witness, error) {
	w := &Witness{lab: l, spells: map[netip.Addr][]spell{}, tenures: map[netip.Addr][]tenure{}}
	var err error
	if w.outside, err = l.Sniff(ctx, "outside"); err != nil {
		return nil, err
	}
	if w.lan, err = l.Sniff(ctx, "lan"); err != nil {
		return nil, err
	}
	if w.etcd, err = l.DialEtcd(); err != nil {
		return nil, err
	}
	now, err := w.etcd.Get(ctx, "/egret/owners/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return nil, fmt.Errorf("reading etcd's revision: %w", err)
	}
	w.revision = now.Header.Revision
	w.begin(ctx)
	return w, nil
}

func (w *Witness) begin(ctx context.Context) {
	ctx, w.end = context.WithCancel(ctx)
	w.done = make(chan struct{})
	go w.follow(ctx, w.done)
}

// Restored says that etcd is since then as it was at a revision. The owners of that time own again.
func (w *Witness) Restored(ctx context.Context, revision int64, since time.Time) error {
	w.end()
	<-w.done
	then, err := w.etcd.Get(ctx, "/egret/owners/", clientv3.WithPrefix(), clientv3.WithRev(revision))
	if err != nil {
		return fmt.Errorf("reading the owners of revision %d: %w", revision, err)
	}
	w.mu.Lock()
	for _, kv := range then.Kvs {
		var o egress.Owner
		if err := json.Unmarshal(kv.Value, &o); err == nil { // else it is a test's
			w.tenures[o.IP] = append(w.tenures[o.IP], tenure{o.Node, since, o.Why})
		}
	}
	w.revision = revision
	w.mu.Unlock()
	w.begin(context.WithoutCancel(ctx))
	return nil
}

// follow records the tenures. An interrupted watch goes on by itself, at the revision where it was.
func (w *Witness) follow(ctx context.Context, done chan struct{}) {
	defer close(done)
	for r := range w.etcd.Watch(ctx, "/egret/owners/", clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithRev(w.revision+1)) {
		for _, e := range r.Events {
			w.mu.Lock()
			w.revision = e.Kv.ModRevision
			w.mu.Unlock()
			var o, former egress.Owner
			if e.Type != clientv3.EventTypePut || json.Unmarshal(e.Kv.Value, &o) != nil {
				continue
			}
			w.mu.Lock()
			w.tenures[o.IP] = append(w.tenures[o.IP], tenure{o.Node, o.Since, o.Why})
			if e.PrevKv != nil && json.Unmarshal(e.PrevKv.Value, &former) == nil && former.Node != o.Node && o.From != former.Node {
				w.usurped = append(w.usurped, fmt.Errorf("revision %d: %s took %s from %s, which had not let go", e.Kv.ModRevision, o.Node, o.IP, former.Node))
			}
			w.mu.Unlock()
		}
	}
}

// Select says that from now on, until the end of the run, a pod (namespace/name) leaves as each of ips, one of a family
// at most. The pod's source ports are set for that. The pod opens no connection before Select returns.
func (w *Witness) Select(ctx context.Context, pod string, ips ...netip.Addr) error {
	b := &band{pod: pod, sources: map[netip.Addr]netip.Addr{}, unknown: map[netip.Addr]time.Time{}, known: map[netip.Addr]lab.Packet{}}
	for _, ip := range ips {
		b.sources[OutsideOf(ip)] = ip
	}
	w.mu.Lock()
	low := firstPort + bandSize*len(w.bands)
	w.bands = append(w.bands, b)
	w.mu.Unlock()
	set := fmt.Sprintf("echo %d %d >/proc/sys/net/ipv4/ip_local_port_range", low, low+bandSize-1)
	if out, err := w.lab.Exec(ctx, "pod", pod, "sh", "-c", set); err != nil {
		return fmt.Errorf("setting the source ports of %s: %w\n%s", pod, err, out)
	}
	return nil
}

// Booting says that the node of a selected pod boots now: until it knows the pod, the pod leaves as the CNI has it.
func (w *Witness) Booting(pod, node string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.takePackets() // what came since an earlier boot is judged by that one
	for _, b := range w.bands {
		if b.pod != pod {
			continue
		}
		b.node = node
		for to := range b.sources {
			if b.unknown[to].IsZero() {
				b.unknown[to] = time.Now()
			}
		}
	}
}

// LAN returns the sniffer on the LAN.
func (w *Witness) LAN() *lab.Sniffer { return w.lan }

// OutsideOf returns the address of the outside host in the family of ip.
func OutsideOf(ip netip.Addr) netip.Addr {
	if ip.Is6() {
		return lab.OutsideIP6
	}
	return lab.OutsideIP
}

// Stop ends the watch and returns what was seen that must never be.
func (w *Witness) Stop() error {
	errs := []error{w.outside.Stop(), w.lan.Stop(), w.Strangers(), w.Doubles(), w.etcd.Close()}
	w.end()
	<-w.done
	return errors.Join(append(errs, w.Usurped())...)
}

// catchUp waits until the tenures are those that etcd has: after an outage of etcd the watch begins again some time
// later.
func (w *Witness) catchUp() error {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	r, err := w.etcd.Get(ctx, "/egret/owners/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return fmt.Errorf("reading the owners: %w", err)
	}
	for {
		w.mu.Lock()
		behind := slices.ContainsFunc(r.Kvs, func(kv *mvccpb.KeyValue) bool { return w.revision < kv.ModRevision })
		w.mu.Unlock()
		if !behind {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.New("the owners' history does not reach the owners")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Locked returns nil when every lock is under the lease of its owner's agent, and each of ips has one.
func (w *Witness) Locked(ctx context.Context, ips ...netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	leases, locked := map[string]int64{}, map[netip.Addr]bool{}
	var errs []error
	if err := read(ctx, w.etcd, "/egret/agents/", func(a egress.Agent, lease int64) { leases[a.Node] = lease }); err != nil {
		return err
	}
	if err := read(ctx, w.etcd, "/egret/owners/", func(o egress.Owner, lease int64) {
		if locked[o.IP] = true; leases[o.Node] != lease {
			errs = append(errs, fmt.Errorf("%s is held by %s under a lease that is not its agent's", o.IP, o.Node))
		}
	}); err != nil {
		return err
	}
	for _, ip := range ips {
		if !locked[ip] {
			errs = append(errs, fmt.Errorf("%s has no owner", ip))
		}
	}
	return errors.Join(errs...)
}

// read calls f with every record below a prefix, and the lease that it is under.
func read[T any](ctx context.Context, etcd *clientv3.Client, prefix string, f func(T, int64)) error {
	r, err := etcd.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		return fmt.Errorf("reading %s: %w", prefix, err)
	}
	for _, kv := range r.Kvs {
		var record T
		if err := json.Unmarshal(kv.Value, &record); err != nil {
			return fmt.Errorf("reading %s: %w", kv.Key, err)
		}
		f(record, kv.Lease)
	}
	return nil
}

// Usurped returns the owners that had not let go when another became the owner.
func (w *Witness) Usurped() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return errors.Join(w.usurped...)
}

// Strangers returns the packets of selected pods that left with another source than their egress IP, the first ten.
func (w *Witness) Strangers() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.takePackets()
	if len(w.bands) > 0 && w.seen == 0 {
		return errors.New("no packet of a selected pod was seen outside: the sniffer proves nothing")
	}
	return errors.Join(w.strange...)
}

// takePackets looks at what came to the outside host since it was last called. The caller holds mu.
func (w *Witness) takePackets() {
	w.readBlocks()
	for _, p := range w.outside.TakePackets() {
		w.spell(p)
		for _, b := range w.bands {
			if b.sources[p.Dst] != p.Src {
				continue
			}
			w.seen++ // by a port of its node's block, or by its own
			if since := b.unknown[p.Dst]; !since.IsZero() && !p.Time.Before(since) && w.ofNode(b.node, p) {
				delete(b.unknown, p.Dst)
				b.known[p.Dst] = p
			}
		}
		i := (int(p.SrcPort) - firstPort) / bandSize
		if int(p.SrcPort) < firstPort || i >= len(w.bands) || !w.bands[i].sources[p.Dst].IsValid() {
			continue
		}
		b := w.bands[i]
		want, since := b.sources[p.Dst], b.unknown[p.Dst]
		switch {
		case !since.IsZero() && !p.Time.Before(since):
			if p.Src == want {
				delete(b.unknown, p.Dst)
				b.known[p.Dst] = p
			}
		case p.Src != want && p.Time.Sub(b.known[p.Dst].Time) < queued:
		case p.Reset && fromNodeItself(p):
			// The node's own kernel, to who still talks to a connection that the CNI had masqueraded before the node
			// knew the pod: its conntrack entry was flushed since.
		case p.Src != want && len(w.strange) < 10:
			err := fmt.Errorf("a packet of %s left with another source than %s: %s", b.pod, want, p)
			if first := b.known[p.Dst]; !first.Time.IsZero() {
				err = fmt.Errorf("%w; the node knew the pod by then: %s", err, first)
			}
			w.strange = append(w.strange, err)
		}
	}
}

// ofNode reports whether a packet has a port of a node's block. The caller holds mu.
func (w *Witness) ofNode(node string, p lab.Packet) bool {
	return slices.ContainsFunc(w.blocks, func(b egress.Block) bool {
		return b.Node == node && b.IP == p.Src && b.First <= p.SrcPort && p.SrcPort <= b.Last()
	})
}

// readBlocks reads which ports are of which node; where etcd does not answer, they are as before. The caller holds mu.
func (w *Witness) readBlocks() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var blocks []egress.Block
	if read(ctx, w.etcd, "/egret/blocks/", func(b egress.Block, _ int64) { blocks = append(blocks, b) }) == nil {
		w.blocks = blocks
	}
}

// fromNodeItself reports whether a packet has the address of the node that it came from.
func fromNodeItself(p lab.Packet) bool {
	n := int(p.SrcMAC[5]) - int(lab.NodeMAC(1)[5]) + 1
	return p.SrcMAC == lab.NodeMAC(n) && slices.Contains(lab.NodeIPs(n), p.Src)
}

// spell notes from which node a packet came. The caller holds mu.
func (w *Witness) spell(p lab.Packet) {
	n := int(p.SrcMAC[5]) - int(lab.NodeMAC(1)[5]) + 1
	node := lab.NodeName(n)
	if _, err := w.lab.NodeNumber(node); err != nil || p.SrcMAC != lab.NodeMAC(n) || slices.Contains(lab.NodeIPs(n), p.Src) {
		return
	}
	all := w.spells[p.Src]
	if i := len(all) - 1; i >= 0 && all[i].node == node {
		all[i].last = p.Time
		return
	}
	w.spells[p.Src] = append(all, spell{node, p.Time, p.Time})
}

// relaying is for how long the former owner of a planned move, or the next one, may send with an IP: --linger, and a
// little.
const relaying = 6 * time.Second

func planned(why egress.Reason) bool {
	return why == egress.ReasonMove || why == egress.ReasonDrain || why == egress.ReasonRebalance
}

// tenureOf returns which of the tenures was the last of a node that had begun at a time; -1: none.
func tenureOf(tenures []tenure, node string, at time.Time) int {
	for i, t := range slices.Backward(tenures) {
		if t.node == node && !t.since.After(at) {
			return i
		}
	}
	return -1
}

// senders returns the spells in which a node sent with an egress IP after another, later owner had, but for the relays
// of planned moves. The caller holds mu.
func (w *Witness) senders() (errs []error) {
	for ip, tenures := range w.tenures {
		latest := 0
		for _, s := range w.spells[ip] {
			i := tenureOf(tenures, s.node, s.last)
			next := slices.IndexFunc(tenures[i+1:], func(t tenure) bool { return t.node != s.node })
			switch {
			case i >= latest:
				latest = i
			case i >= 0 && next >= 0 && planned(tenures[i+1+next].why) && s.last.Sub(tenures[i+1+next].since) < relaying:
			case slices.ContainsFunc(tenures, func(t tenure) bool {
				return t.node == s.node && planned(t.why) && t.since.After(s.first) && t.since.Sub(s.first) < relaying
			}):
			default:
				errs = append(errs, fmt.Errorf("%s sent with %s from %s to %s; %s had, as its owner since %s", s.node, ip, s.first.Format(clock),
					s.last.Format(clock), tenures[latest].node, tenures[latest].since.Format(clock)))
			}
		}
	}
	return errs
}

const clock = "15:04:05.000000"

// word is a packet in which a host gave the link-layer address of an IP: ARP or NDP.
type word struct {
	time time.Time
	port string
	ip   netip.Addr
	fmt.Stringer
}

// spoken returns what was said on the LAN so far, in ARP and NDP, in order.
func (w *Witness) spoken() []word {
	var words []word
	for _, a := range w.lan.ARPs() {
		words = append(words, word{a.Time, a.Port, a.SenderIP, a})
	}
	for _, n := range w.lan.NDPs() {
		words = append(words, word{n.Time, n.Port, n.IP, n})
	}
	slices.SortStableFunc(words, func(a, b word) int { return a.time.Compare(b.time) })
	return words
}

// Doubles returns the packets with which a node spoke for an egress IP after another, later owner had, or sent with it,
// the first ten.
func (w *Witness) Doubles() error {
	if err := w.catchUp(); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	latest := map[netip.Addr]int{}
	seen := 0
	for _, a := range w.spoken() {
		tenures := w.tenures[a.ip]
		if len(tenures) == 0 || a.port == "to-outside" {
			continue // not an egress IP, or a test's stranger
		}
		seen++
		node := a.port[len("to-"):]
		i := tenureOf(tenures, node, a.time)
		switch {
		case i < 0:
			errs = append(errs, fmt.Errorf("%s spoke for %s and never owned it before: %s", node, a.ip, a))
		case i < latest[a.ip]:
			errs = append(errs, fmt.Errorf("%s spoke for %s after %s had: %s", node, a.ip, tenures[latest[a.ip]].node, a))
		default:
			latest[a.ip] = i
		}
	}
	w.takePackets()
	errs = append(errs, w.senders()...)
	if len(w.tenures) > 0 && seen == 0 {
		errs = append(errs, errors.New("no ARP packet or advertisement for an egress IP was seen: the sniffer proves nothing"))
	}
	return errors.Join(errs[:min(len(errs), 10)]...)
}

// LastAnswer returns when the node last spoke for ip; zero: never.
func (w *Witness) LastAnswer(ip netip.Addr, node string) time.Time {
	for _, a := range slices.Backward(w.spoken()) {
		if a.ip == ip && a.port == "to-"+node {
			return a.time
		}
	}
	return time.Time{}
}

// Tenures counts the changes of owners seen so far, by their reasons.
func (w *Witness) Tenures() map[egress.Reason]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	count := map[egress.Reason]int{}
	for _, tenures := range w.tenures {
		for i, t := range tenures {
			// else its lock moved to another lease
			if i == 0 || tenures[i-1].node != t.node || !tenures[i-1].since.Equal(t.since) {
				count[t.why]++
			}
		}
	}
	return count
}
