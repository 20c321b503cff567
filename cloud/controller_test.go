package cloud_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/cloud"
	"github.com/egret-project/egret/cloud/aws"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/ec2test"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/syncbuf"
	"github.com/egret-project/egret/store"
)

// world is an etcd, as agents and crdsync would have it, and a cloud.
type world struct {
	*testing.T
	ec2  *ec2test.Server
	etcd *store.Client
	log  *syncbuf.Buffer
}

// newWorld has nodes n0, n1 ... with an interface eni-0, eni-1 ... each, and room for so many addresses.
func newWorld(t *testing.T, nodes, room int) world {
	t.Helper()
	w := world{T: t, ec2: ec2test.New(t), log: &syncbuf.Buffer{}}
	w.etcd = w.dial(etcdtest.New(t))
	w.put(store.PoolKey("pool"), egress.Pool{Name: "pool"})
	for i := range nodes {
		v4, v6 := fmt.Sprintf("10.0.0.%d", i+1), fmt.Sprintf("fd00::%d", i+1)
		w.ec2.Add(fmt.Sprintf("eni-%d", i), room, v4, v6)
		w.node(i, v4, v6)
	}
	return w
}

func (w world) dial(s *etcdtest.Server) *store.Client {
	w.Helper()
	c, err := store.Dial(w.Context(), store.Config{Endpoints: []string{s.Endpoint()}})
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = c.Close() }) // the test is over
	return c
}

func (w world) put(key string, v any) {
	w.Helper()
	b, err := store.Encode(v)
	if err == nil {
		_, err = w.etcd.Etcd().Put(w.Context(), w.etcd.Prefix()+key, string(b))
	}
	if err != nil {
		w.Fatal(err)
	}
}

func (w world) del(key string) {
	w.Helper()
	if _, err := w.etcd.Etcd().Delete(w.Context(), w.etcd.Prefix()+key); err != nil {
		w.Fatal(err)
	}
}

func (w world) node(i int, addresses ...string) {
	n := egress.Node{Name: fmt.Sprintf("n%d", i), Index: i + 1}
	for _, a := range addresses {
		n.Addresses = append(n.Addresses, netip.MustParseAddr(a))
	}
	w.put(store.NodeKey(n.Name), n)
}

// allocate is what crdsync does, own what the agent of a node does.
func (w world) allocate(ips ...netip.Addr) {
	for _, ip := range ips {
		w.put(store.AllocationKey(ip), egress.Allocation{IP: ip, Pool: "pool", ID: 1})
	}
}

func (w world) own(node int, ips ...netip.Addr) {
	w.Helper()
	var ops []clientv3.Op
	for _, ip := range ips {
		b, err := store.Encode(egress.Owner{IP: ip, Node: fmt.Sprintf("n%d", node), Why: egress.ReasonClaim})
		if err != nil {
			w.Fatal(err)
		}
		ops = append(ops, clientv3.OpPut(w.etcd.Prefix()+store.OwnerKey(ip), string(b)))
	}
	for chunk := range slices.Chunk(ops, 100) {
		if _, err := w.etcd.Etcd().Txn(w.Context()).Then(chunk...).Commit(); err != nil {
			w.Fatal(err)
		}
	}
}

// start runs a controller until stop is called, or the test ends.
func (w world) start(id string, options ...func(*cloud.Config)) (stop func()) {
	w.Helper()
	api, err := aws.New(w.Context(), aws.Config{Region: ec2test.Region, VPC: ec2test.VPC, Endpoint: w.ec2.URL, Credentials: ec2test.Credentials})
	if err != nil {
		w.Fatal(err)
	}
	cfg := cloud.Config{
		Store: w.etcd, Cloud: api, ID: id, ElectionTTL: 2 * time.Second,
		Log: slog.New(slog.NewTextHandler(w.log, nil)), Metrics: prometheus.NewRegistry(),
	}
	cloud.Quick(&cfg, time.Minute)
	for _, o := range options {
		o(&cfg)
	}
	ctx, cancel := context.WithCancel(w.Context())
	done := make(chan error, 1)
	go func() { done <- cloud.Run(ctx, cfg) }()
	var once atomic.Bool
	stop = func() {
		cancel()
		if once.CompareAndSwap(false, true) {
			if err := <-done; err != nil {
				w.Errorf("controller %s ended: %v", id, err)
			}
		}
	}
	w.Cleanup(stop)
	return stop
}

func check(every time.Duration, doubts ...time.Duration) func(*cloud.Config) {
	return func(c *cloud.Config) { cloud.Quick(c, every, doubts...) }
}

// until waits for what has to come true.
func (w world) until(what string, ok func() bool) {
	w.Helper()
	for end := time.Now().Add(60 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			w.Fatalf("not within a minute: %s\n%s", what, w.log.String())
		}
	}
}

func (w world) at(node int, ips ...netip.Addr) {
	w.Helper()
	id := fmt.Sprintf("eni-%d", node)
	w.until(fmt.Sprintf("%v at %s", ips, id), func() bool {
		return !slices.ContainsFunc(ips, func(ip netip.Addr) bool { return w.ec2.Holder(ip) != id })
	})
}

// recorded waits until etcd says of addresses that they are Egret's, and nothing is pending.
func (w world) recorded(ips ...netip.Addr) {
	w.Helper()
	w.until("recorded", func() bool {
		all, err := w.etcd.List(w.Context(), store.CloudPrefix)
		return err == nil && !slices.ContainsFunc(ips, func(ip netip.Addr) bool {
			r, ok := all[store.CloudKey(ip)]
			return !ok || strings.Contains(string(r.Value), "asked")
		})
	})
}

// onlyRecord wants etcd to say of one address alone that it is Egret's.
func (w world) onlyRecord(ip netip.Addr) {
	w.Helper()
	all, err := w.etcd.List(w.Context(), store.CloudPrefix)
	if err != nil || len(all) != 1 {
		w.Errorf("records %v, %v, want that of %s alone", all, err, ip)
	}
}

func (w world) never(worst int) {
	w.Helper()
	if n := w.ec2.Worst(); n > worst {
		w.Errorf("an address has had %d interfaces at a time", n)
	}
}

// changes are the calls that are no reads.
func changes(calls []ec2test.Call) []ec2test.Call {
	return slices.DeleteFunc(calls, func(c ec2test.Call) bool { return c.Action == "DescribeNetworkInterfaces" })
}

func v4(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}) }
func v6(n int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("fd00::1:%x", n)) }

func many(n int, ip func(int) netip.Addr) (out []netip.Addr) {
	for i := range n {
		out = append(out, ip(30+i))
	}
	return out
}

func TestAddressFollowsItsOwner(t *testing.T) {
	for name, ip := range map[string]netip.Addr{"IPv4": v4(50), "IPv6": v6(50)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 3, 10)
			w.ec2.Lax()
			w.start("one")
			w.allocate(ip)
			for _, node := range []int{0, 1, 2, 1, 0} {
				w.own(node, ip)
				w.at(node, ip)
			}
			w.recorded(ip)
			w.never(1)
		})
	}
}

// The guide's cluster has the address moved by one call, while the claimer waits for permits to end.
func TestAMoveOfIPv4IsOneCall(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, 10)
	w.start("one")
	ip := v4(50)
	w.allocate(ip)
	w.own(0, ip)
	w.at(0, ip)
	w.recorded(ip)
	w.ec2.Calls()
	w.own(1, ip)
	w.at(1, ip)
	calls := w.ec2.Calls()
	if len(calls) != 1 || calls[0].Action != "AssignPrivateIpAddresses" || !calls[0].Move || calls[0].Interface != "eni-1" {
		t.Errorf("calls %+v, want one that moves it to eni-1", calls)
	}
}

// A claimer waits for the permits of the former owner, half a second unless told otherwise, from the lock on. The cloud
// is asked at once: what it takes is not added to that.
func TestTheCloudIsAskedWhileTheClaimerWaitsForPermits(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, 10)
	w.start("one")
	ip := v4(50)
	w.allocate(ip)
	w.own(0, ip)
	w.at(0, ip)
	w.recorded(ip)
	asked := make(chan time.Time, 100)
	w.ec2.Fault(func(c ec2test.Call) ec2test.Fault {
		if c.Action == "AssignPrivateIpAddresses" {
			asked <- time.Now()
		}
		return ec2test.Fault{}
	})
	soonest := time.Hour // of several: a busy machine makes one late
	for i := range 5 {
		node := (i + 1) % 2
		locked := time.Now()
		w.own(node, ip)
		soonest = min(soonest, (<-asked).Sub(locked))
		w.at(node, ip)
	}
	t.Logf("EC2 was asked %v after the lock", soonest)
	if most := 250 * time.Millisecond; soonest > most {
		t.Errorf("EC2 was asked %v after the lock, want %v at most", soonest, most)
	}
}

func TestManyAddressesOfADeadGatewayAreMovedByFewCalls(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 5, 250)
	ips := many(200, v4)
	w.allocate(ips...)
	w.own(0, ips...)
	w.start("one")
	w.at(0, ips...)
	w.recorded(ips...)
	w.ec2.Calls()
	w.ec2.Fault(func(ec2test.Call) ec2test.Fault { return ec2test.Fault{Delay: 200 * time.Millisecond} })
	began := time.Now()
	for i := range 4 {
		w.own(1+i, ips[50*i:50*i+50]...)
	}
	for i := range 4 {
		w.at(1+i, ips[50*i:50*i+50]...)
	}
	dur, calls := time.Since(began), changes(w.ec2.Calls())
	t.Logf("200 addresses to 4 interfaces: %d calls, %v, with answers that take 200 ms", len(calls), dur)
	if len(calls) > 12 {
		t.Errorf("%d calls for 200 addresses of 4 interfaces, want 12 at most", len(calls))
	}
	w.never(1)
}

func TestALostAnswerGivesNoAddressToTwo(t *testing.T) {
	for name, ip := range map[string]netip.Addr{"IPv4": v4(50), "IPv6": v6(50)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 3, 10)
			w.ec2.Lax()
			w.start("one")
			w.allocate(ip)
			luck := rand.New(rand.NewPCG(1, 2))              // Fault is asked by one at a time
			w.ec2.Fault(func(c ec2test.Call) ec2test.Fault { // of reads, too
				return ec2test.Fault{Lose: luck.IntN(3) == 0, Delay: time.Duration(luck.IntN(5)) * time.Millisecond}
			})
			for i := range 20 {
				w.own(i%3, ip)
				if i%4 != 0 {
					w.at(i%3, ip)
				}
			}
			w.never(1)
			w.ec2.Fault(func(ec2test.Call) ec2test.Fault { return ec2test.Fault{} })
			w.recorded(ip)
		})
	}
}

// The controller's request is on its way when it gives up, and is done after the address has gone on.
func TestARequestThatIsDoneLateIsUndone(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 3, 10)
	ip := v4(50)
	w.allocate(ip)
	w.own(0, ip)
	w.start("one", check(time.Minute, 100*time.Millisecond, 500*time.Millisecond, time.Second))
	w.at(0, ip)
	w.recorded(ip)
	var late atomic.Bool
	due := &ec2test.Late{Do: make(chan struct{}), Done: make(chan struct{})}
	do := sync.OnceFunc(func() { close(due.Do) })
	t.Cleanup(do) // else the server would wait for it
	w.ec2.Fault(func(c ec2test.Call) ec2test.Fault {
		if c.Interface == "eni-1" && late.CompareAndSwap(false, true) {
			return ec2test.Fault{Late: due}
		}
		return ec2test.Fault{}
	})
	w.own(1, ip)
	w.until("the request is on its way", late.Load)
	w.own(2, ip)
	w.at(2, ip)
	do()
	<-due.Done
	w.at(2, ip)
	w.never(1)
}

func TestThrottlingDelaysAndLosesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, 100)
	ips := many(60, v4)
	w.allocate(ips...)
	w.start("one")
	n, luck := 0, rand.New(rand.NewPCG(3, 4)) // Fault is asked by one at a time
	w.ec2.Fault(func(ec2test.Call) ec2test.Fault { n++; return ec2test.Fault{Throttle: luck.IntN(3) != 0} })
	w.own(0, ips...)
	w.at(0, ips...)
	w.own(1, ips...)
	w.at(1, ips...)
	w.ec2.Fault(func(ec2test.Call) ec2test.Fault { return ec2test.Fault{} })
	t.Logf("%d requests, of which two of three were throttled", n)
	if n > 200 {
		t.Errorf("%d requests for 60 addresses", n)
	}
}

func TestASteadyStateAsksForNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, 10)
	ips := []netip.Addr{v4(50), v6(50)}
	w.allocate(ips...)
	w.own(0, ips...)
	stop := w.start("one")
	w.at(0, ips...)
	w.recorded(ips...)
	stop()
	w.ec2.Calls()
	before, err := w.etcd.List(t.Context(), store.CloudPrefix)
	if err != nil {
		t.Fatal(err)
	}
	w.start("two", check(300*time.Millisecond))
	var calls []ec2test.Call
	w.until("some checks", func() bool { calls = append(calls, w.ec2.Calls()...); return len(calls) >= 8 })
	if did := changes(calls); len(did) > 0 {
		t.Errorf("a steady state asks for %+v", did)
	}
	after, err := w.etcd.List(t.Context(), store.CloudPrefix)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, after); d != "" {
		t.Errorf("a steady state writes to etcd (-before +after):\n%s", d)
	}
}

func TestOneControllerAssignsAtATime(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 3, 100)
	ips := many(20, v4)
	w.allocate(ips...)
	w.own(0, ips...)
	w.ec2.Fault(func(c ec2test.Call) ec2test.Fault {
		if c.Action == "DescribeNetworkInterfaces" {
			return ec2test.Fault{}
		}
		return ec2test.Fault{Delay: 300 * time.Millisecond}
	})
	stop := w.start("one")
	w.at(0, ips...)
	w.recorded(ips...)
	w.start("two")
	w.ec2.Calls()
	w.own(1, ips...)
	var calls []ec2test.Call
	w.until("a call is under way", func() bool { calls = append(calls, changes(w.ec2.Calls())...); return len(calls) > 0 })
	go stop() // in mid call
	w.own(2, ips...)
	w.at(2, ips...)
	w.until("both led", func() bool { return strings.Count(w.log.String(), "msg=leading") == 2 })
	for _, c := range changes(w.ec2.Calls()) {
		if c.Interface == "eni-0" {
			t.Errorf("an owner of long ago was given addresses: %+v", c)
		}
	}
	w.at(2, ips...)
	w.never(1)
}

func TestOneAddressThatIsRefusedHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, 4)
	w.node(7, "10.0.9.9") // of which the cloud knows nothing
	good, foreign, outside, nowhere := many(2, v4), v4(60), netip.MustParseAddr("10.0.5.5"), v4(61)
	w.ec2.Add("eni-other", 4, "10.0.0.200")
	w.ec2.Put(foreign, "eni-other")
	all := append(slices.Clone(good), foreign, outside, nowhere)
	w.allocate(all...)
	w.start("one")
	w.own(0, append(slices.Clone(good), foreign, outside)...)
	w.own(7, nowhere)
	w.at(0, good...)
	for _, said := range []string{
		"eni-other has the address, and Egret has not assigned it there",
		"does not fall within the subnet's address range: want an IP of the subnet",
		"node n7: the cloud shows no network interface with an address of the node",
	} {
		w.until("the log says: "+said, func() bool { return strings.Contains(w.log.String(), said) })
	}
	if h := w.ec2.Holder(foreign); h != "eni-other" {
		t.Errorf("%s was taken from who had it: %q has it", foreign, h)
	}
	w.allocate(many(6, v4)...)
	w.own(0, many(6, v4)...)
	w.until("the limit is told", func() bool { return strings.Contains(w.log.String(), "node.antrea.io/max-egress-ips") })
	w.ec2.Put(foreign, "") // as the log asks for
	w.own(1, foreign)
	w.at(1, foreign)
}

func TestAnAddressWithoutAllocationIsUnassigned(t *testing.T) {
	for name, ip := range map[string]netip.Addr{"IPv4": v4(50), "IPv6": v6(50)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 2, 10)
			foreign := v4(70)
			w.ec2.Put(foreign, "eni-1")
			w.allocate(ip, v4(51))
			w.own(0, ip)
			w.start("one")
			w.at(0, ip)
			w.recorded(ip)
			w.del(store.OwnerKey(ip)) // as when its node is off: it stays
			w.own(1, v4(51))
			w.at(1, v4(51))
			if h := w.ec2.Holder(ip); h != "eni-0" {
				t.Errorf("an address that is allocated and has no owner went from eni-0 to %q", h)
			}
			w.del(store.AllocationKey(ip))
			w.until("unassigned", func() bool { return w.ec2.Holder(ip) == "" })
			w.until("forgotten", func() bool {
				all, err := w.etcd.List(t.Context(), store.CloudKey(ip))
				return err == nil && len(all) == 0
			})
			if h := w.ec2.Holder(foreign); h != "eni-1" {
				t.Errorf("somebody else's address was taken from eni-1 to %q", h)
			}
		})
	}
}

func TestAnAddressThatWasAssignedByHandToItsOwnerIsAdopted(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, 10)
	ip := v4(50)
	w.ec2.Put(ip, "eni-0")
	w.allocate(ip)
	w.own(0, ip)
	w.start("one")
	w.recorded(ip)
	if calls := changes(w.ec2.Calls()); len(calls) > 0 {
		t.Errorf("%+v, though it is where it should be", calls)
	}
	w.own(1, ip)
	w.at(1, ip)
}

func TestStaticAddressesAreLeftAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, 10)
	static, other := v4(1), v4(50) // n0's own
	w.put(store.OwnerKey(static), egress.Owner{IP: static, Node: "n1", Why: egress.ReasonStatic})
	w.start("one")
	w.allocate(other)
	w.own(0, other)
	w.recorded(other)
	for _, c := range changes(w.ec2.Calls()) {
		if slices.Contains(c.IPs, static) {
			t.Errorf("%+v", c)
		}
	}
}

// An agent may write the lock of any IP: what it is worth is for the allocation to say, which it may not write.
func TestWhoClaimsAnAddressThatIsNoEgressIPGetsNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 3, 10)
	pods, stranger, other := v4(60), v4(61), v4(50)
	w.ec2.Put(pods, "eni-1")
	w.ec2.Put(stranger, "eni-2")
	w.own(1, pods) // as if it were Egret's, and where it should be
	w.own(0, stranger, v4(2))
	w.start("one")
	w.allocate(other)
	w.own(0, other)
	w.recorded(other)
	w.own(0, pods)
	w.own(1, other)
	w.at(1, other)
	w.del(store.OwnerKey(pods))
	w.own(2, other)
	w.at(2, other)
	for _, c := range changes(w.ec2.Calls()) {
		if len(c.IPs) != 1 || c.IPs[0] != other {
			t.Errorf("%+v", c)
		}
	}
	w.onlyRecord(other)
}

func TestANodesOwnAddressIsNotTouched(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 3, 10)
	own, other := v4(2), v4(50) // n1's own, in a pool by mistake
	w.start("one")
	w.allocate(own, other)
	w.own(1, own)
	w.own(0, other)
	w.recorded(other)
	w.own(0, own)
	w.until("it is told", func() bool { return strings.Contains(w.log.String(), "is an address of node n1") })
	w.own(2, other)
	w.at(2, other)
	for _, c := range changes(w.ec2.Calls()) {
		if slices.Contains(c.IPs, own) {
			t.Errorf("%+v", c)
		}
	}
	w.onlyRecord(other)
}

func TestARefusalThatIsAboutNoAddressIsNotAskedForHalves(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, 100)
	var n atomic.Int32
	w.ec2.Fault(func(c ec2test.Call) ec2test.Fault {
		if c.Action == "DescribeNetworkInterfaces" {
			return ec2test.Fault{}
		}
		if len(c.IPs) < 40 {
			n.Add(1)
		}
		return ec2test.Fault{Code: "UnauthorizedOperation"}
	})
	ips := many(40, v4)
	w.allocate(ips...)
	w.own(0, ips...)
	w.start("one")
	w.until("it is told", func() bool { return strings.Count(w.log.String(), "UnauthorizedOperation") == len(ips) })
	if n := n.Load(); n > 0 {
		t.Errorf("%d calls for a part of the addresses", n)
	}
}

func TestAnAddressThatWasMovedToAnotherInterfaceOfItsNodeGoesBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, 10)
	w.ec2.Add("eni-second", 10, "10.0.0.101")
	w.node(0, "10.0.0.1", "10.0.0.101", "fd00::1")
	ip := v4(50)
	w.allocate(ip)
	w.own(0, ip)
	w.start("one", check(100*time.Millisecond))
	w.at(0, ip)
	w.recorded(ip)
	w.ec2.Put(ip, "eni-second")
	w.at(0, ip)
}

// The new node has the name and the address of the former, and another interface. Nothing is due to be read for a
// minute.
func TestANodeThatWasReplacedByOneOfItsNameIsReadWhenItClaims(t *testing.T) {
	for name, ip := range map[string]netip.Addr{"IPv4": v4(50), "IPv6": v6(50)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 1, 10)
			w.allocate(ip)
			w.own(0, ip)
			w.start("one", check(time.Minute, time.Millisecond))
			w.at(0, ip)
			w.recorded(ip)
			w.ec2.Remove("eni-0")
			w.ec2.Add("eni-7", 10, "10.0.0.1", "fd00::1")
			w.own(0, ip)
			began := time.Now()
			w.at(7, ip)
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

func TestAReadOfManyPagesMayTakeLongerThanOneAnswer(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 30, 10) // 10 pages of each family, of 0.5 s: a call has 2 s
	w.ec2.Fault(func(c ec2test.Call) ec2test.Fault {
		if c.Action == "DescribeNetworkInterfaces" {
			return ec2test.Fault{Delay: 500 * time.Millisecond}
		}
		return ec2test.Fault{}
	})
	ip := v4(50)
	w.allocate(ip)
	w.own(0, ip)
	stop := w.start("one", check(100*time.Millisecond))
	w.at(0, ip)
	w.until("it is reading again", func() bool { return len(w.ec2.Calls()) > 0 })
	began := time.Now()
	stop()
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("it ended %v after it was told to, in the middle of a read", took)
	}
	if strings.Contains(w.log.String(), "does not answer") {
		t.Errorf("the log says\n%s", w.log)
	}
}
