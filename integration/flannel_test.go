package integration

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// TestBesideFlannel runs flanneld on every node, with VXLAN links and a masquerade of its own, in place of what the lab's nodes have for their pods.
// integration/kube/flannel/build makes it. integration/kubelet has flannel with all that belongs to it, and its plugin.
func TestBesideFlannel(t *testing.T) {
	program := filepath.Join(filepath.Dir(cluster.EgretPath()), "k8s-"+lab.KubeVersion, "flannel", "flanneld")
	if _, err := os.Stat(program); err != nil {
		t.Skipf("%v: build it with integration/kube/flannel/build", err)
	}
	for _, mode := range []string{"iptables", "nftables"} {
		t.Run(mode, func(t *testing.T) { besideFlannel(t, program, mode) })
	}
}

func besideFlannel(t *testing.T, program, mode string) {
	l, err := lab.Up(t.Context(), lab.Config{Name: lab.OwnName("e2e-flannel"), Nodes: len(nodes()), LeaseTTL: leaseTTL})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	shared := cluster
	cluster = l
	defer func() { cluster = shared }()

	f := &flannel{t: t, program: program, dir: t.TempDir(), running: map[string]*exec.Cmd{}}
	t.Cleanup(f.logs)
	defer f.stop()
	config := fmt.Sprintf(`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd44::/16", "EnableNFTables": %v, "Backend": {"Type": "vxlan"}}`,
		mode == "nftables")
	if err := os.WriteFile(f.dir+"/net-conf.json", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, node := range nodes() {
		f.insteadOfTheLab(node)
	}
	f.start()

	n := &namespace{t: t, name: "flannel"}
	n.dual("both", "10.10.0.31", "fd10::31")
	ips := bothIPs(t, "both")
	_, gateway := held(t, "both")
	pods := map[string]lab.Pod{}
	pod := func(name, node, app string) string {
		t.Helper()
		p, err := l.Pod(t.Context(), lab.PodConfig{Name: n.name + "/" + name, Node: node, Labels: map[string]string{"app": app}})
		if err != nil {
			t.Fatal(err)
		}
		f.on("pod", p.Name, "ip link set eth0 mtu 1450") // as flannel's plugin has it
		pods[p.Name] = p
		serve(t, "pod", p.Name)
		return p.Name
	}
	var webs, dbs []string
	for _, node := range nodes() {
		webs, dbs = append(webs, pod("web-"+node, node, "web")), append(dbs, pod("db-"+node, node, "db"))
	}
	check := func() {
		t.Helper()
		for i, ip := range ips {
			for _, web := range webs {
				leavesWithin(t, 15*time.Second, web, ip)
			}
			for _, db := range dbs { // by flannel's masquerade
				number, _ := l.NodeNumber(pods[db].Node)
				sees(t, "the outside", db, outsideOf(ip), lab.EchoPort, lab.NodeIPs(number)[i])
				for _, web := range webs {
					sees(t, "a pod of "+pods[db].Node, web, pods[db].IPs[i], servePort, pods[web].IPs[i])
				}
			}
		}
	}
	check()
	for i, headers := range []int{28, 48} {
		f.on("pod", webs[0], fmt.Sprintf("ping -n -c1 -W5 -M do -s %d %s", 1450-headers, pods[dbs[1]].IPs[i]))
	}

	// It looks for the address of each node anew, and writes its rules anew.
	before, owners := f.addresses(), ownership(t)
	var remote string
	for _, web := range webs {
		if pods[web].Node != gateway {
			remote = web
		}
	}
	var r6 lab.ProbeResult
	r4 := probeTo(t, lab.OutsideIP, remote, 12*time.Second, func() {
		r6 = probeTo(t, lab.OutsideIP6, remote, 10*time.Second, func() {
			f.stop()
			f.start()
		})
	})
	for i, r := range []lab.ProbeResult{r4, r6} {
		only(t, r, ips[i])
		lossless(t, fmt.Sprintf("flannel restarted, %v", ips[i]), r)
	}
	if after := f.addresses(); after != before {
		t.Errorf("the nodes' addresses, as flannel has them: got\n%s\nafter a restart, want as before\n%s", after, before)
	}
	for ip, node := range ownership(t) {
		if owners[ip] != node {
			t.Errorf("%v is on %s after flannel's restart, want %s as before", ip, node, owners[ip])
		}
	}
	check()
}

// flannel is flanneld on every node.
type flannel struct {
	t       *testing.T
	program string
	dir     string
	running map[string]*exec.Cmd // by node
}

func (f *flannel) on(kind, name, line string) string {
	f.t.Helper()
	out, err := cluster.Exec(f.t.Context(), kind, name, strings.Fields(line)...)
	if err != nil {
		f.t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// peers are the other nodes' pods: one's address in each family.
func (f *flannel) peers(node string) (ips []netip.Addr) {
	number, _ := cluster.NodeNumber(node)
	for n := range nodes() {
		if n+1 != number {
			ips = append(ips, netip.MustParseAddr(fmt.Sprintf("10.244.%d.2", n+1)), netip.MustParseAddr(fmt.Sprintf("fd44:%d::2", n+1)))
		}
	}
	return ips
}

// insteadOfTheLab takes the lab's own ways to pods of other nodes away, and its masquerade.
func (f *flannel) insteadOfTheLab(node string) {
	f.t.Helper()
	f.on("node", node, "nft delete table inet cni")
	for _, ip := range f.peers(node) {
		bits := 24
		if ip.Is6() {
			bits = 64
		}
		p, err := ip.Prefix(bits)
		if err != nil {
			f.t.Fatal(err)
		}
		f.on("node", node, "ip route del "+p.String())
	}
}

// start starts those that do not run, and returns when all nodes have their routes.
func (f *flannel) start() {
	f.t.Helper()
	for _, node := range nodes() {
		log, err := os.OpenFile(filepath.Join(f.dir, node+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			f.t.Fatal(err)
		}
		defer log.Close()
		c := exec.Command("ip", "netns", "exec", "egret-"+cluster.Name()+"-"+node, f.program, "--kube-subnet-mgr", "--ip-masq",
			"--kubeconfig-file", filepath.Join(filepath.Dir(cluster.Kubeconfig()), "kubeconfig.control"),
			"--net-config-path", f.dir+"/net-conf.json", "--subnet-file", filepath.Join(f.dir, node+".env"))
		c.Env, c.Stdout, c.Stderr = append(os.Environ(), "NODE_NAME="+node), log, log
		_ = os.Remove(filepath.Join(f.dir, node+".env")) // there is none at first
		if err := c.Start(); err != nil {
			f.t.Fatal(err)
		}
		f.running[node] = c
	}
	for _, node := range nodes() {
		eventually(f.t, time.Minute, func() error {
			// written when the rules are there
			if _, err := os.Stat(filepath.Join(f.dir, node+".env")); err != nil {
				return err
			}
			for _, ip := range f.peers(node) {
				out, err := cluster.Exec(f.t.Context(), "node", node, "ip", "route", "get", ip.String())
				if err != nil || !strings.Contains(string(out), " dev flannel") {
					return fmt.Errorf("the way from %s to %v: %s, error %v, want a link of flannel", node, ip, out, err)
				}
			}
			return nil
		})
	}
}

// stop ends those that run. What they made stays.
func (f *flannel) stop() {
	for _, c := range f.running {
		_ = c.Process.Signal(syscall.SIGTERM) // it is ours, and not waited for
	}
	for node, c := range f.running {
		kill := time.AfterFunc(20*time.Second, func() { _ = c.Process.Kill() })
		_ = c.Wait() // its log says what was wrong
		kill.Stop()
		delete(f.running, node)
	}
}

func (f *flannel) logs() {
	if !f.t.Failed() {
		return
	}
	for _, node := range nodes() {
		b, err := os.ReadFile(filepath.Join(f.dir, node+".log"))
		f.t.Logf("flanneld of %s: %v\n%s", node, err, b[:min(len(b), 10000)])
	}
}

// addresses returns where flannel has nodes send what is for the pods of another one.
func (f *flannel) addresses() string {
	f.t.Helper()
	const prefix = `.metadata.annotations.flannel\.alpha\.coreos\.com/public-ip`
	return kubectl(f.t, "get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name} {`+prefix+`} {`+prefix+`v6}{"\n"}{end}`)
}
