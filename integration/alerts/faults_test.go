package alerts

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/store"
)

// fault is what an alert is for.
type fault struct {
	// its name, and where that is known the instance and what it is about: the beginning of how firing says it
	alert  string
	breaks func()
	mends  func() // nil: nothing is to be mended
	// looksBack: its expression has a window of minutes, for which it fires on.
	looksBack bool
}

// holder stands in an alert for the node that holds web's IP when the fault is made.
const holder = "HOLDER"

// faults returns all, in an order in which they share what is broken: those from etcd's being full until crdsync's
// failing write nothing to etcd.
func (s *site) faults() []fault {
	return slices.Concat(s.faultsOfPools(), s.faultsOfNodes(), s.faultsWhileFull(), s.faultsOfAgents())
}

func (s *site) faultsOfPools() []fault {
	return []fault{
		{"EgretEgressIPHeldByNobody 127.0.0.1:8482 10.10.0.11", s.kubectl("patch", "externalippool", "web", "--type", "merge", "-p", `{"spec":{"nodeSelector":{"matchLabels":{"no":"node"}}}}`),
			s.kubectl("patch", "externalippool", "web", "--type", "json", "-p", `[{"op":"replace","path":"/spec/nodeSelector","value":{}}]`), false},
		{"EgretNotAllocated", func() { s.egress("lost", "nowhere") }, s.kubectl("delete", "--ignore-not-found", "egress", "lost"), false},
		{"EgretPoolNearlyFull", func() { s.pool("two", "10.10.0.13", "10.10.0.14"); s.egress("second", "two") }, s.kubectl("delete", "--ignore-not-found", "egress", "second", "two"), false},
		{"EgretAddressInUse", func() {
			s.in("outside", "", "ip addr add 10.10.0.15/24 dev eth0")()
			s.pool("used", "10.10.0.15", "10.10.0.15")
		}, func() {
			s.in("outside", "", "ip addr del 10.10.0.15/24 dev eth0")()
			s.kubectl("delete", "--ignore-not-found", "egress", "used")()
		}, false},
		// A kernel without VLANs is a reason as good as a link of another program.
		{"EgretPoolRefused node-3 tagged", func() {
			s.in("node", "node-3", "ip link add "+egress.VLANLink(7)+" type veth peer name other")()
			s.apply(`
apiVersion: crd.antrea.io/v1beta1
kind: ExternalIPPool
metadata: {name: tagged}
spec:
  ipRanges: [{start: 10.11.0.11, end: 10.11.0.12}]
  subnetInfo: {gateway: 10.11.0.1, prefixLength: 24, vlan: 7}
  nodeSelector: {}
`)
		}, func() {
			s.kubectl("delete", "--ignore-not-found", "externalippool", "tagged")()
			s.in("node", "node-3", "ip link del "+egress.VLANLink(7))()
		}, false},
	}
}

func (s *site) faultsOfNodes() []fault {
	return []fault{
		{"EgretDegraded node-3 node", s.kubectl("delete", "--ignore-not-found", "node", "node-3"), func() {
			s.causes["EgretChangesSlow"] = time.Now()
			s.pod("prod/web-3", "node-3")
			s.written(store.MembersByNodeKey("node-3", "web")) // its kernel learns of the pod when the node is back
			s.must(nil, s.lab.RegisterNode(s.Context(), "node-3"))
		}, false},
		{"EgretChangesSlow node-3", func() {}, nil, true}, // by that pod
		{"EgretPortsNearlyGivenOut 127.0.0.1:8482 10.10.0.11", func() { s.pod("prod/web-2", "node-2") }, nil, false},
		{"EgretPermitsNotRenewed", func() {
			node := s.holder("")
			s.cut(node, "etcd")()
			s.cut(node, "peers")()
			s.holder(node)
			time.Sleep(2 * time.Second) // it goes on trying, eight times a second
			s.heal(node, "peers")()
			s.heal(node, "etcd")()
		}, nil, true},
		// A disk that is slow again and again, and processors that are.
		{"EgretEtcdSlow", func() {
			s.stall("EgretEtcdSlow", 200*time.Millisecond, "etcd")
		}, nil, true},
		{"EgretPermitMarginLow " + holder, func() {
			s.stall("EgretPermitMarginLow "+s.holder(""), 440*time.Millisecond, "agent-node-1", "agent-node-2", "agent-node-3")
		}, nil, true},
	}
}

// faultsWhileFull are those of an etcd that is full, of which crdsync has failed often enough after a minute, and
// others meanwhile.
func (s *site) faultsWhileFull() []fault {
	return []fault{
		{"EgretPacketsDropped node-1 10.10.0.11", func() {
			s.causes["EgretCrdsyncFails"] = time.Now()
			s.fillEtcd()
			s.pool("late", "10.10.0.17", "10.10.0.17") // which crdsync cannot write
			s.in("node", "node-1", "nft add table ip other")()
			s.in("node", "node-1", "nft add chain ip other post { type nat hook postrouting priority -199 ; }")()
			s.in("node", "node-1", "nft insert rule ip other post ip saddr 10.244.0.0/16 snat to 10.10.0.101")()
			for range 20 { // connections that do not come through
				if _ = s.open("prod/web-1", time.Second); s.made("EgretPacketsDropped") {
					break
				}
			}
		}, s.in("node", "node-1", "nft delete table ip other"), false},
		{"EgretForgedPackets node-2 overlay_foreign", s.in("outside", "", "bash -c echo>/dev/udp/10.10.0.102/8479"), nil, true},
		{"EgretRPFilterReset node-1", s.in("node", "node-1", "sysctl -qw net.ipv4.conf.egret/vx.rp_filter=1"), nil, true},
		{"EgretGossipPartitioned node-3", s.cut("node-3", "peers"), s.heal("node-3", "peers"), false},
		{"EgretWebhookFails 127.0.0.1:8482", s.review("no review"), nil, true},
		{"EgretNATLogIncomplete node-1 write", func() {
			if err := os.WriteFile(filepath.Join(s.logs, "other"), make([]byte, 256<<10), 0o600); !errors.Is(err, syscall.ENOSPC) {
				s.Fatalf("filling the file system of the logs: %v, want that it is full", err)
			}
			for range 50 { // the log's last page has room for some lines
				s.must(nil, s.open("prod/web-1", 5*time.Second))
			}
		}, nil, true},
		{"EgretPortsNearlyUsed node-", s.usePorts, nil, true}, // that of the smallest block
		{"EgretCrdsyncFails 127.0.0.1:8482", func() {
			// A pass between the alarm that crdsync disarms and the next one writes: then there is something new to write.
			for n := 0; n < 30 && !s.made("EgretCrdsyncFails"); n++ {
				s.kubectl("patch", "externalippool", "late", "--type", "merge", "-p", fmt.Sprintf(`{"spec":{"nodeSelector":{"matchLabels":{"late":"%d"}}}}`, n))()
				time.Sleep(2 * time.Second)
			}
		}, func() {
			s.full()
			s.kubectl("delete", "--ignore-not-found", "egress", "late")()
		}, true},
	}
}

func (s *site) faultsOfAgents() []fault {
	start := func() { s.Helper(); s.must(nil, s.lab.Start(s.Context(), "agent", s.died)) }
	return []fault{
		{"EgretAgentMissing", s.kill, start, false},
		{"EgretTakeoverSlow", func() {
			has := s.holder("")
			others := slices.DeleteFunc([]string{"node-1", "node-2", "node-3"}, func(node string) bool { return node == has })
			for _, node := range others {
				s.egret("cordon", node)
			}
			s.kill()
			s.until("nobody holds web's IP", time.Minute, `egret_egress_info{egress="web"}`, "node", func(now []string) bool { return slices.Equal(now, []string{""}) })
			time.Sleep(5 * time.Second) // which is slow
			for _, node := range others {
				s.egret("uncordon", node)
			}
			s.holder(s.died)
		}, start, true},
		{"EgretTakeoversRepeat", func() {
			for range 5 {
				s.kill()
				has := s.holder(s.died)
				// else it might be killed next, without a trace of that it took over
				s.until("its take-over is counted", time.Minute, `egret_takeover_duration_seconds_count{cause=~"crash|release"} > 0`, "instance",
					func(now []string) bool { return slices.Contains(now, has) })
				start()
				s.scraped() // else the next one to take over might not begin at 0
			}
		}, nil, true},
		{"EgretNoLeader", s.stop("crdsync"), s.start("crdsync"), false},
		{"EgretEtcdLost", s.stop("etcd"), s.start("etcd"), false},
	}
}

// kill kills the agent of the node that holds web's IP, when that is scraped.
func (s *site) kill() {
	s.Helper()
	s.died = s.holder("")
	s.must(nil, s.lab.Kill(s.Context(), "agent", s.died))
}

func (s *site) stop(what string) func() {
	return func() { s.Helper(); s.must(nil, s.lab.Stop(s.Context(), what, "")) }
}

func (s *site) start(what string) func() {
	return func() { s.Helper(); s.must(nil, s.lab.Start(s.Context(), what, "")) }
}

func (s *site) cut(node, what string) func() {
	return func() { s.Helper(); s.must(nil, s.lab.Cut(s.Context(), node, what)) }
}

func (s *site) heal(node, what string) func() {
	return func() { s.Helper(); s.must(nil, s.lab.Heal(s.Context(), node, what)) }
}

func (s *site) egret(args ...string) {
	s.Helper()
	s.must(s.lab.Egret(s.Context(), append(args, "--dial-timeout", "1m")...)) // a busy machine takes its time
}

// pod makes a pod of the egress web.
func (s *site) pod(name, node string) {
	s.Helper()
	if _, err := s.lab.Pod(s.Context(), lab.PodConfig{Name: name, Node: node, Labels: map[string]string{"app": "web"}}); err != nil {
		s.Fatal(err)
	}
}

// written waits until etcd has a key.
func (s *site) written(key string) {
	s.Helper()
	client, err := s.lab.DialEtcd()
	if err != nil {
		s.Fatal(err)
	}
	defer client.Close()
	for until := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		resp, err := client.Get(s.Context(), store.DefaultPrefix+key)
		if err == nil && resp.Count > 0 {
			return
		}
		if time.Now().After(until) {
			s.Fatalf("etcd has no key %s: %v", key, err)
		}
	}
}

// fillEtcd makes etcd say that it is full until full is called: it raises the alarm as etcd does, and again as crdsync
// disarms it, since there is room.
func (s *site) fillEtcd() {
	s.Helper()
	client, err := s.lab.DialEtcd()
	if err != nil {
		s.Fatal(err)
	}
	raise := func(ctx context.Context) error {
		_, err := pb.NewMaintenanceClient(client.ActiveConnection()).Alarm(ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE, MemberID: 1})
		return err
	}
	s.must(nil, raise(s.Context()))
	ctx, cancel := context.WithCancel(s.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for tick := time.Tick(100 * time.Millisecond); ; {
			select {
			case <-tick:
				_ = raise(ctx) // it stands still at times: the next one does it
			case <-ctx.Done():
				return
			}
		}
	}()
	s.full = func() {
		s.full = nil
		cancel()
		<-done
		defer client.Close()
		for until := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
			list, err := client.AlarmList(s.Context())
			if err == nil && len(list.Alarms) == 0 { // crdsync has disarmed it
				return
			}
			if time.Now().After(until) {
				s.Fatalf("the alarm is there still: %v, %v", list, err)
			}
		}
	}
}

// usePorts opens nearly as many connections to one port as the smallest block has, from the pod of its node.
func (s *site) usePorts() {
	s.Helper()
	var pod string
	smallest := 0
	for n := range 3 {
		node := fmt.Sprintf("node-%d", n+1)
		for size := egress.MinBlock; size <= egress.MaxBlock; size *= 2 {
			if len(s.labels(fmt.Sprintf(`egret_egress_ports{instance=%q,egress_ip="10.10.0.11"} == %d`, node, size), "instance")) > 0 && (smallest == 0 || size < smallest) {
				smallest, pod = size, fmt.Sprintf("prod/web-%d", n+1)
			}
		}
	}
	if smallest == 0 || smallest > 1<<13 {
		s.Fatalf("the smallest block has %d ports, want 8192 at most", smallest)
	}
	s.must(nil, s.lab.In("pod", pod, func() error {
		for i := range smallest * 19 / 20 {
			c, err := net.DialUDP("udp4", &net.UDPAddr{Port: 20000 + i}, &net.UDPAddr{IP: lab.OutsideIP.AsSlice(), Port: 9})
			if err != nil {
				return err
			}
			if _, err := c.Write([]byte("x")); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
				return errors.Join(err, c.Close())
			}
			if err := c.Close(); err != nil { // the kernel knows the connection for half a minute
				return err
			}
		}
		return nil
	}))
}

// stall has processes stand still again and again, all at the same time, until an alert fires, for a minute at most.
func (s *site) stall(alert string, long time.Duration, processes ...string) {
	s.Helper()
	var pids []int
	for _, name := range processes {
		pid, err := s.lab.PID(name)
		if err != nil {
			s.Fatal(err)
		}
		pids = append(pids, pid)
	}
	signal := func(sig syscall.Signal) (err error) {
		for _, pid := range pids {
			err = errors.Join(err, syscall.Kill(pid, sig))
		}
		return err
	}
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(400 * time.Millisecond) {
		err := signal(syscall.SIGSTOP)
		time.Sleep(long)
		s.must(nil, errors.Join(err, signal(syscall.SIGCONT)))
		if s.made(alert) {
			return
		}
	}
}
