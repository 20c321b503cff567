package page

import (
	"context"
	"fmt"
	"net/netip"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// cluster is a large one, in an etcd.
type cluster struct {
	t      testing.TB
	client *store.Client
	nodes  int
	ops    []clientv3.Op
	turn   int

	egresses int
	began    time.Time
	asked    atomic.Int64 // how often agents were asked for traffic
	silent   atomic.Bool  // no agent answers
}

var teams = []string{"billing", "checkout", "search", "mail", "reports", "partners", "mobile", "ledger", "fraud", "exports"}

func egressName(i int) string { return fmt.Sprintf("%s-%d", teams[i%len(teams)], i/len(teams)+1) }
func nodeName(i int) string   { return fmt.Sprintf("node-%d", i+1) }
func egressIP(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 20, byte(1 + i/250), byte(1 + i%250)})
}

// newCluster writes so many egresses and nodes, of which a few have troubles.
func newCluster(t testing.TB, egresses, nodes int) *cluster {
	t.Helper()
	client, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcdtest.New(t).Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	c := &cluster{t: t, client: client, nodes: nodes, egresses: egresses, began: time.Now()}
	now := time.Now().UTC()
	pools := (egresses + 249) / 250
	for i := range pools {
		name := fmt.Sprintf("pool-%d", i+1)
		c.put(store.PoolKey(name), egress.Pool{Name: name, Ranges: []egress.Range{{Start: egressIP(250 * i), End: egressIP(250*i + 249).Next()}}})
	}
	for i := range nodes {
		name := nodeName(i)
		a := netip.AddrFrom4([4]byte{10, 10, byte(i / 250), byte(1 + i%250)})
		c.put(store.NodeKey(name), egress.Node{
			Name: name, Index: i + 1, Addresses: []netip.Addr{a}, PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(100 + i/250), byte(i % 250), 0}), 24)}, Capacity: 255,
			Cordoned: i == nodes/2,
		})
		switch i {
		case 16, 40: // is down
		case 27:
			c.agent(i, map[string]string{"nftables": "adding rule: no space left on device"})
		default:
			c.agent(i, nil)
		}
	}
	for i := range egresses {
		name, ip, gateway := egressName(i), egressIP(i), nodeName(i%nodes)
		pool := fmt.Sprintf("pool-%d", i/250+1)
		at := now.Add(-time.Duration(10+i*7) * time.Minute)
		p := egress.Policy{Name: name, Addresses: []egress.Address{{IP: ip, ID: egress.ID(i + 1), Pool: pool}}, Created: at}
		if i%25 == 3 {
			p.Bandwidth = &egress.Bandwidth{Rate: 200e6, Burst: 1e6}
		}
		c.put(store.EgressKey(name), p)
		c.put(store.AllocationKey(ip), egress.Allocation{IP: ip, Pool: pool, ID: egress.ID(i + 1), Egresses: []string{name}, Since: at})
		if i != 16 { // its node is down, and nobody has it yet
			c.own(i, gateway, at)
		}
		for j := range 3 {
			node := nodeName((i*3 + j) % nodes)
			m := egress.Members{Egress: name, Node: node}
			for k := range 2 {
				pod := netip.AddrFrom4([4]byte{10, byte(100 + ((i*3+j)%nodes)/250), byte(((i*3 + j) % nodes) % 250), byte(10 + 2*(i%100) + k)})
				m.Pods = append(m.Pods, egress.Member{Pod: fmt.Sprintf("%s/%s-%d%d", teams[i%len(teams)], name, j, k), IPs: []netip.Addr{pod}})
			}
			b := egress.Block{IP: ip, First: uint16(2048 + 1024*j), Size: 1024, Node: node, Egress: name, Since: at}
			m.Blocks = []egress.Block{b}
			c.put(store.BlockKey(ip, b.First), b)
			c.put(store.MembersByEgressKey(name, node), m)
			c.put(store.MembersByNodeKey(node, name), m)
		}
	}
	c.put("elections/crdsync/1", "egret-crdsync-7d9f/1")
	c.flush()
	return c
}

func (c *cluster) put(key string, record any) {
	c.t.Helper()
	value, err := store.Encode(record)
	if text, ok := record.(string); ok {
		value = []byte(text)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	// etcd takes 128
	if c.ops = append(c.ops, clientv3.OpPut(c.client.Prefix()+key, string(value))); len(c.ops) == 120 {
		c.flush()
	}
}

func (c *cluster) flush() {
	if len(c.ops) == 0 {
		return
	}
	c.t.Helper()
	if _, err := c.client.Etcd().Txn(c.t.Context()).Then(c.ops...).Commit(); err != nil {
		c.t.Fatal(err)
	}
	c.ops = nil
}

func (c *cluster) agent(i int, faults map[string]string) {
	name := nodeName(i)
	c.put(store.AgentKey(name), egress.Agent{Node: name, Lease: egress.FormatLease(0), Version: "v1.4.0", Since: time.Now().Add(-80 * time.Hour), Faults: faults, Ready: true})
}

func (c *cluster) own(i int, node string, at time.Time) {
	ip := egressIP(i)
	c.put(store.OwnerKey(ip), egress.Owner{IP: ip, Node: node, Since: at, Why: egress.ReasonClaim})
	c.put(store.HistoryKey(egress.Tenure{IP: ip, Node: node, Since: at}), egress.Tenure{IP: ip, Node: node, Since: at, Why: egress.ReasonClaim})
}

// change moves an IP, or has an agent begin or end to complain, by turns. It is for flush.
func (c *cluster) change() {
	c.turn++
	i := 100 + c.turn%300
	if c.turn%2 == 0 {
		c.own(i, nodeName((i+c.turn)%c.nodes), time.Now().UTC())
	} else {
		faults := map[string]string{"routes": "adding route: network is unreachable"}
		if c.turn%4 == 1 {
			faults = nil
		}
		c.agent(i, faults)
	}
}

// traffic says what passes by the egress IPs of a gateway, as its agent would: more the lower the IP, at a steady rate.
func (c *cluster) traffic(_ context.Context, node string, _ []netip.Addr) (egress.NodeTraffic, error) {
	if c.asked.Add(1); c.silent.Load() {
		return egress.NodeTraffic{}, fmt.Errorf("the agent of node %s is down", node)
	}
	out, up := map[netip.Addr]egress.Traffic{}, time.Since(c.began)+time.Hour
	since := uint64(up.Milliseconds())
	for i := range c.egresses {
		if nodeName(i%c.nodes) == node {
			n := since * uint64(3000/(i+1)+1) // bytes a millisecond
			out[egressIP(i)] = egress.Traffic{SentPackets: n / 800, SentBytes: n, ReceivedPackets: n / 400, ReceivedBytes: 3 * n}
		}
	}
	return egress.NodeTraffic{Node: node, Read: up, IPs: out}, nil
}

// kernel is what the agent of a node answers of its kernel, which has all that it should.
func (c *cluster) kernel(_ context.Context, node string, _ []netip.Addr, _ string, v url.Values, reply any) error {
	q, err := egress.ParseKernelQuestion(v)
	*reply.(*egress.Kernel) = egress.Kernel{
		Node: node, Watching: true, Permit: 0.4, Answers: true, PodID: q.ID, Steered: true, Gateway: q.Peer, First: 2048, Ports: 1024, Guarded: -1,
	}
	return err
}

// page returns a Page of the cluster that runs until the test ends.
func (c *cluster) page() *Page {
	p := New(c.client, Agents{Traffic: c.traffic, Kernels: operator.Kernels{Ask: c.kernel, Page: "/kernel"}}, nil)
	ctx, stop := context.WithCancel(context.WithoutCancel(c.t.Context()))
	done := make(chan struct{})
	go func() { defer close(done); _ = p.Run(ctx) }() // it ends without an error
	c.t.Cleanup(func() { stop(); <-done })
	return p
}
