package lab

import (
	"context"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// member is one server of Egret's etcd.
type member struct {
	proc string // also the name that it has among the members
	host lanHost
}

// members returns Egret's etcd. One server alone runs on the control host; several have a host each.
func (l *Lab) members() []member {
	if l.cfg.EtcdMembers == 1 {
		return []member{{etcdProc, control}}
	}
	var all []member
	for i := range l.cfg.EtcdMembers {
		name := etcdProc + "-" + strconv.Itoa(i+1)
		all = append(all, member{name, lanHost{name, etcdHost + i + 1}})
	}
	return all
}

func (m member) ip() netip.Addr { return families()[0].host(m.host.number) }

func (m member) clientAddr() string { return netip.AddrPortFrom(m.ip(), etcdPort).String() }

// peerURL is for the other members. A server without any listens where nobody else looks.
func (l *Lab) peerURL(m member) string {
	ip := m.ip()
	if l.cfg.EtcdMembers == 1 {
		ip = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return "http://" + netip.AddrPortFrom(ip, etcdPeerPort).String()
}

// initialCluster is the members as etcd's configuration names them.
func (l *Lab) initialCluster() string {
	var all []string
	for _, m := range l.members() {
		all = append(all, m.proc+"="+l.peerURL(m))
	}
	return strings.Join(all, ",")
}

func (l *Lab) etcd(m member) component {
	return component{proc: m.proc, netns: m.host.name, argv: l.etcdArgs(m.proc, "http://"+m.clientAddr(), l.peerURL(m), l.initialCluster())}
}

func (l *Lab) etcds() []component {
	var all []component
	for _, m := range l.members() {
		all = append(all, l.etcd(m))
	}
	return all
}

func (l *Lab) kubeEtcd() component {
	client, peer := fmt.Sprintf("http://127.0.0.1:%d", kubeEtcdPort), fmt.Sprintf("http://127.0.0.1:%d", kubeEtcdPeerPort)
	return component{proc: kubeEtcdProc, netns: "control", argv: l.etcdArgs(kubeEtcdProc, client, peer, kubeEtcdProc+"="+peer)}
}

func (l *Lab) etcdArgs(name, clientURL, peerURL, cluster string) []string {
	argv := []string{l.cfg.Self, "etcd"}
	if l.cfg.Etcd != "" && name != kubeEtcdProc {
		argv = []string{l.cfg.Etcd}
	}
	return append(argv, name, l.path(name+".data"), clientURL, peerURL, cluster)
}

// OldestEtcd returns the program of the oldest etcd that Egret is tested with, for Config.Etcd: `make kube` builds it.
func OldestEtcd() string { return program("etcd-oldest") }

// AgentEndpoints is what --endpoints of crdsync and the agents is.
func (l *Lab) AgentEndpoints() string {
	var all []string
	for _, m := range l.members() {
		all = append(all, m.clientAddr())
	}
	return strings.Join(all, ",")
}

// EtcdMembers returns the names of the members of Egret's etcd, for Stop, Start, Freeze, Thaw and Partition.
// EtcdEndpoints has them in the same order.
func (l *Lab) EtcdMembers() []string {
	var all []string
	for _, m := range l.members() {
		all = append(all, m.proc)
	}
	return all
}

// SaveEtcd writes a snapshot of Egret's etcd to a file, as `etcdctl snapshot save` does.
func (l *Lab) SaveEtcd(ctx context.Context, file string) error {
	cfg := clientv3.Config{Endpoints: l.EtcdEndpoints()[:1], DialTimeout: 5 * time.Second, Logger: zap.NewNop()}
	if _, err := snapshot.NewV3(zap.NewNop()).Save(ctx, cfg, file); err != nil {
		return fmt.Errorf("saving etcd: %w", err)
	}
	return nil
}

// RestoreEtcd has Egret's etcd start with what SaveEtcd wrote and with nothing else, as after `etcdutl snapshot
// restore`. It returns when etcd answers.
func (l *Lab) RestoreEtcd(ctx context.Context, file string) error {
	return l.change(ctx, func(s *state) error {
		for _, m := range l.members() {
			if err := l.stop(ctx, m.proc, stopGrace); err != nil {
				return err
			}
			data := l.path(m.proc + ".data")
			if err := os.RemoveAll(data); err != nil {
				return err
			}
			if err := snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
				SnapshotPath: file, Name: m.proc, OutputDataDir: data, PeerURLs: []string{l.peerURL(m)}, InitialCluster: l.initialCluster(),
				InitialClusterToken: embed.NewConfig().InitialClusterToken,
			}); err != nil {
				return fmt.Errorf("restoring the data of %s: %w", m.proc, err)
			}
		}
		for _, c := range l.etcds() {
			if err := l.start(s, c); err != nil {
				return err
			}
		}
		return l.waitEtcd(ctx)
	})
}

// runEtcd is an etcd server until ctx ends: NAME DATADIR CLIENTURL PEERURL CLUSTER.
func runEtcd(ctx context.Context, args []string) error {
	if len(args) != 5 {
		return fmt.Errorf("want NAME DATADIR CLIENTURL PEERURL CLUSTER, got %q", args)
	}
	client, err := url.Parse(args[2])
	if err != nil {
		return err
	}
	peer, err := url.Parse(args[3])
	if err != nil {
		return err
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.InitialCluster = args[0], args[1], args[4]
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	cfg.UnsafeNoFsync = true // the data need not outlive the machine
	cfg.LogLevel = "warn"
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case err := <-e.Err():
		return err
	}
	// Close waits for every open watch of its clients; what is committed is written already, so a second is patience
	// enough.
	closed := make(chan struct{})
	go func() { e.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(time.Second):
	}
	return nil
}
