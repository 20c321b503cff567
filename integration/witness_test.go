package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

// witness watches the lab from outside over the whole run: every ARP packet and neighbor advertisement on the LAN, every packet that reaches the outside host, and
// who holds what in etcd.
type witness struct {
	outside, lan *lab.Sniffer
	etcd         *clientv3.Client
	done         chan struct{}

	mu      sync.Mutex                  // guards what follows
	bands   []map[netip.Addr]netip.Addr // of the packets whose source port is in band i: destination -> expected source
	tenures map[netip.Addr][]tenure     // in order
	names   []string                    // pod of band i
}

// tenure is a time during which a node owned an IP; it ends with the next one.
type tenure struct {
	node  string
	since time.Time
}

// The pods whose source is known use source ports of their own, which SNAT keeps: so a packet seen outside tells whose it is even when
// its source address is wrong.
const (
	firstPort = 20000
	bandSize  = 100
)

func startWitness(ctx context.Context, l *lab.Lab) (*witness, error) {
	w := &witness{done: make(chan struct{}), tenures: map[netip.Addr][]tenure{}}
	var err error
	if w.outside, err = l.Sniff(ctx, "outside"); err != nil {
		return nil, err
	}
	if w.lan, err = l.Sniff(ctx, "lan"); err != nil {
		return nil, err
	}
	if w.etcd, err = clientv3.New(clientv3.Config{Endpoints: []string{l.EtcdEndpoint()}, DialTimeout: 5 * time.Second}); err != nil {
		return nil, err
	}
	go w.follow(ctx)
	return w, nil
}

// follow records the tenures. An interrupted watch goes on by itself, at the revision where it was.
func (w *witness) follow(ctx context.Context) {
	defer close(w.done)
	for r := range w.etcd.Watch(ctx, "/egret/owners/", clientv3.WithPrefix()) {
		for _, e := range r.Events {
			var o egress.Owner
			if e.Type == clientv3.EventTypePut && json.Unmarshal(e.Kv.Value, &o) == nil {
				w.mu.Lock()
				w.tenures[o.IP] = append(w.tenures[o.IP], tenure{o.Node, o.Since})
				w.mu.Unlock()
			}
		}
	}
}

// selected waits until the pod leaves as each of ips, one of a family at most. From then on, until the end of the run, none of its packets
// of these families may leave otherwise.
func selected(t *testing.T, pod string, ips ...netip.Addr) {
	t.Helper()
	sources := map[netip.Addr]netip.Addr{}
	for _, ip := range ips {
		leavesAs(t, pod, ip)
		sources[outsideOf(ip)] = ip
	}
	watch.mu.Lock()
	low := firstPort + bandSize*len(watch.bands)
	watch.bands, watch.names = append(watch.bands, sources), append(watch.names, pod)
	watch.mu.Unlock()
	set := fmt.Sprintf("echo %d %d >/proc/sys/net/ipv4/ip_local_port_range", low, low+bandSize-1)
	if out, err := cluster.Exec(t.Context(), "pod", pod, "sh", "-c", set); err != nil {
		t.Fatalf("setting the source ports of %s: %v\n%s", pod, err, out)
	}
	for _, ip := range ips {
		leavesAs(t, pod, ip)
	}
}

// outsideOf returns the address of the outside host in the family of ip.
func outsideOf(ip netip.Addr) netip.Addr {
	if ip.Is6() {
		return lab.OutsideIP6
	}
	return lab.OutsideIP
}

// stop ends the watch and returns what was seen that must never be.
func (w *witness) stop() error {
	errs := []error{w.outside.Stop(), w.lan.Stop(), w.etcd.Close()}
	<-w.done
	return errors.Join(append(errs, w.strangers(), w.doubles())...)
}

// strangers returns the packets of selected pods that left with another source than their egress IP.
func (w *witness) strangers() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	seen := 0
	for _, p := range w.outside.Packets() {
		band := (int(p.SrcPort) - firstPort) / bandSize
		if int(p.SrcPort) < firstPort || band >= len(w.bands) || !w.bands[band][p.Dst].IsValid() {
			continue
		}
		seen++
		if want := w.bands[band][p.Dst]; p.Src != want && len(errs) < 10 {
			errs = append(errs, fmt.Errorf("a packet of %s left with another source than %s: %s", w.names[band], want, p))
		}
	}
	if len(w.bands) > 0 && seen == 0 {
		errs = append(errs, errors.New("no packet of a selected pod was seen outside: the sniffer proves nothing"))
	}
	return errors.Join(errs...)
}

// word is a packet in which a host told the link-layer address of an IP.
type word struct {
	time time.Time
	port string
	ip   netip.Addr
	fmt.Stringer
}

// spoken returns what was said on the LAN so far, in ARP and NDP, in order.
func (w *witness) spoken() []word {
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

// doubles returns the packets with which a node spoke for an egress IP after another, later owner had.
func (w *witness) doubles() error {
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
		i := len(tenures) - 1
		for ; i >= 0; i-- {
			if t := tenures[i]; t.node == node && !t.since.After(a.time) {
				break
			}
		}
		switch {
		case i < 0:
			errs = append(errs, fmt.Errorf("%s spoke for %s and never owned it before: %s", node, a.ip, a))
		case i < latest[a.ip]:
			errs = append(errs, fmt.Errorf("%s spoke for %s after %s had: %s", node, a.ip, tenures[latest[a.ip]].node, a))
		default:
			latest[a.ip] = i
		}
	}
	if len(w.tenures) > 0 && seen == 0 {
		errs = append(errs, errors.New("no ARP packet or advertisement for an egress IP was seen: the sniffer proves nothing"))
	}
	return errors.Join(errs[:min(len(errs), 10)]...)
}

// lastAnswer returns when the node last spoke for ip.
func (w *witness) lastAnswer(ip netip.Addr, node string) time.Time {
	for _, a := range slices.Backward(w.spoken()) {
		if a.ip == ip && a.port == "to-"+node {
			return a.time
		}
	}
	return time.Time{}
}

// askWhoHas asks for ip from the outside host, by broadcast or multicast, again and again until the function that it returns is called.
func askWhoHas(t *testing.T, ip netip.Addr) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	ask := []string{"arping", "-q", "-b", "-f", "-w", "1", "-I", "eth0", ip.String()}
	if ip.Is6() {
		// What is not known is asked for.
		ask = []string{"sh", "-c", fmt.Sprintf("ip -6 neigh flush to %s dev eth0; ping -6 -q -c1 -W1 %[1]s", ip)}
	}
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			// Without an answer it ends after a second with an error; that silence is what the test is about.
			_, _ = cluster.Exec(ctx, "outside", "", ask...)
		}
	}()
	return func() { cancel(); <-done }
}
