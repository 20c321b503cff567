package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// member is the configuration of `egret-etcd run`.
type member struct {
	name, dataDir, initialCluster, token string
	hostIP, listenIP                     string
	clientPort, peerPort, statusPort     int
	certs, rootCerts                     string
	peerNames                            []string
	quota                                int64
	compactAfter                         time.Duration
	restore                              string
}

func runCommand() *cobra.Command {
	var m member
	c := &cobra.Command{
		Use:   "run",
		Short: "Run a member",
		Long: "Runs a member of etcd until SIGTERM. Clients and members show each other certificates: ca.crt, tls.crt and tls.key of --certs. Where\n" +
			"ca.crt changes it ends, to be started anew, when all members serve and those before it in --initial-cluster, by name, have done so. The\n" +
			"data directory wins over --initial-cluster, which counts at the first start alone. A member that has no data, while most of the others\n" +
			"have, is removed from their cluster and joins it anew, as etcd's user root (--root-certs).",
		Args: cobra.NoArgs,
	}
	s := c.Flags()
	s.StringVar(&m.name, "name", "", "name of this member, one of --initial-cluster")
	s.StringVar(&m.dataDir, "data-dir", "/var/lib/egret-etcd", "directory of this member's data")
	s.StringVar(&m.initialCluster, "initial-cluster", "", "all members, as name=https://host:port, comma separated")
	s.StringVar(&m.token, "initial-cluster-token", "egret", "what tells this cluster from others; the name of the file of --restore-from is part of it, too")
	s.StringVar(&m.hostIP, "host-ip", "", "address of this node that clients dial")
	s.StringVar(&m.listenIP, "listen-ip", "", "address to listen on for clients and members (default: all, of the family of --host-ip)")
	s.IntVar(&m.clientPort, "client-port", 8483, "port for clients")
	s.IntVar(&m.peerPort, "peer-port", 8484, "port for members")
	s.IntVar(&m.statusPort, "status-port", 8485, "port on 127.0.0.1 for /health, /readyz, /livez and /metrics; 0: none")
	s.StringVar(&m.certs, "certs", "/etc/egret/etcd", "directory with ca.crt, tls.crt and tls.key; certificates that are replaced there are used from the next connection on")
	s.StringVar(&m.rootCerts, "root-certs", "/etc/egret/etcd-root", "directory with ca.crt, tls.crt and tls.key of a client that may change who is a member")
	s.StringSliceVar(&m.peerNames, "peer-common-names", []string{"egret-etcd"}, "common names of certificates that members show: a client of etcd is no member")
	s.Int64Var(&m.quota, "quota-backend-bytes", 512<<20, "how large the database may be; beyond it etcd takes nothing until there is room")
	s.DurationVar(&m.compactAfter, "auto-compaction-retention", time.Hour, "how long it is remembered what a key was")
	s.StringVar(&m.restore, "restore-from", "", "snapshot to begin with where --data-dir has no data and no other member serves: the same file at every member")
	c.RunE = func(c *cobra.Command, _ []string) error { return m.run(c.Context()) }
	return c
}

// config returns the configuration of etcd, or every fault at once.
func (m *member) config() (*embed.Config, error) {
	var errs []error
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	host, err := netip.ParseAddr(m.hostIP)
	if err != nil {
		fault("--host-ip %q: want an address of this node, as clients dial it", m.hostIP)
	}
	members, err := types.NewURLsMap(m.initialCluster)
	if err != nil || len(members) == 0 {
		fault("--initial-cluster %q: want name=https://host:port of each member: %v", m.initialCluster, err)
	}
	own, ok := members[m.name]
	if !ok {
		fault("--name %q: it is not one of --initial-cluster %s", m.name, m.initialCluster)
	}
	if m.quota < 16<<20 || m.quota > 8<<30 {
		fault("--quota-backend-bytes %d: want 16 MB (%d) to 8 GB (%d)", m.quota, 16<<20, int64(8)<<30)
	}
	if m.compactAfter < time.Minute {
		fault("--auto-compaction-retention %v: want 1m at least", m.compactAfter)
	}
	for _, file := range []string{"ca.crt", "tls.crt", "tls.key"} {
		if _, err := os.Stat(filepath.Join(m.certs, file)); err != nil {
			fault("--certs: %w: `egret credentials` makes them", err)
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.InitialCluster, cfg.InitialClusterToken = m.name, m.dataDir, m.initialCluster, m.token
	if m.restore != "" {
		// So members with data of before do not take those that were restored for their own.
		cfg.InitialClusterToken += "/" + filepath.Base(m.restore)
	}
	listen := m.listenIP
	if listen == "" { // etcd takes addresses alone
		listen = netip.IPv4Unspecified().String()
		if host.Is6() {
			listen = netip.IPv6Unspecified().String()
		}
	}
	cfg.ListenClientUrls, cfg.ListenPeerUrls = at("https", listen, m.clientPort), at("https", listen, m.peerPort)
	cfg.AdvertiseClientUrls, cfg.AdvertisePeerUrls = at("https", host.String(), m.clientPort), own
	cfg.ListenMetricsUrls = nil
	if m.statusPort != 0 {
		cfg.ListenMetricsUrls = at("http", "127.0.0.1", m.statusPort)
	}
	tls := func() transport.TLSInfo {
		return transport.TLSInfo{
			CertFile: filepath.Join(m.certs, "tls.crt"), KeyFile: filepath.Join(m.certs, "tls.key"), TrustedCAFile: filepath.Join(m.certs, "ca.crt"), ClientCertAuth: true,
		}
	}
	cfg.ClientTLSInfo, cfg.PeerTLSInfo = tls(), tls()
	// Members are known by the common name: their addresses change with their nodes, and etcd would compare them with
	// those of the certificate.
	cfg.PeerTLSInfo.AllowedCNs, cfg.PeerTLSInfo.SkipClientSANVerify = m.peerNames, true
	// The gateway speaks to etcd in the name of the member, whoever asks it.
	cfg.EnableGRPCGateway = false
	cfg.QuotaBackendBytes = m.quota
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModePeriodic, m.compactAfter.String()
	cfg.LogLevel = "warn"
	return cfg, cfg.Validate()
}

func at(scheme, ip string, port int) []url.URL {
	return []url.URL{{Scheme: scheme, Host: net.JoinHostPort(ip, strconv.Itoa(port))}}
}

func (m *member) run(ctx context.Context) error {
	cfg, err := m.config()
	if err != nil {
		return err
	}
	if err := m.begin(ctx, cfg); ctx.Err() != nil {
		return nil
	} else if err != nil {
		return err
	}
	cas, err := os.ReadFile(cfg.PeerTLSInfo.TrustedCAFile)
	if err != nil {
		return err
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		if has, bad := hasData(m.dataDir); bad == nil && !has { // an empty database that etcd makes first
			_ = os.RemoveAll(filepath.Join(m.dataDir, "member")) // else the next start moves it away
		}
		return fmt.Errorf("starting etcd: %w", err)
	}
	log := e.GetLogger()
	ready := e.Server.ReadyNotify()
	defer func() {
		if ready != nil {
			e.Server.Stop() // else Close waits until it is ready
		}
		e.Close()
	}()
	// Before its clients are closed, which takes seconds where they watch: a leader that hands over costs them less than
	// an election.
	leave := func() {
		if err := e.Server.TryTransferLeadershipOnShutdown(); err != nil {
			log.Warn("the others will have to elect a leader", zap.Error(err))
		}
	}
	trust := trust{m: m, cfg: cfg, read: cas}
	look := time.NewTicker(time.Second)
	defer look.Stop()
	for {
		select {
		case <-ready:
			log.Warn("egret-etcd serves", zap.String("name", m.name), zap.String("version", version), zap.String("endpoint", cfg.AdvertiseClientUrls[0].String()))
			ready = nil
			look.Reset(lookEvery)
		case <-look.C:
			if ready != nil {
				if err := m.elsewhere(ctx, cfg, e.Server.Cluster().ID()); err != nil && ctx.Err() == nil {
					return err
				}
			} else if trust.look(ctx) {
				leave()
				return fmt.Errorf("the CAs of --certs %s changed, and etcd reads them when it starts: ended, to be started anew", m.certs)
			}
		case <-e.Server.StopNotify():
			return m.stopped(ctx, cfg, e, errors.New("etcd stopped by itself: its log says why"))
		case err := <-e.Err():
			return m.stopped(ctx, cfg, e, err)
		case <-ctx.Done():
			leave()
			return nil
		}
	}
}

// isAtHome returns an error where the node has the data of another member: a member that is scheduled there begins with
// nothing, and two that do so while the third one is down would be an etcd that knows nothing, under the third one's
// name for it.
func (m *member) isAtHome() error {
	members, err := types.NewURLsMap(m.initialCluster)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(members)) {
		dir := filepath.Join(filepath.Dir(m.dataDir), name)
		if has, err := hasData(dir); has && name != m.name {
			errs = append(errs, fmt.Errorf("--data-dir %s: it has no data, and %s is the data of another member: bring %s back to the node that has its own, "+
				"or, where %s serves elsewhere by now, or all members are to begin anew or with a snapshot, move %[2]s away", m.dataDir, dir, m.name, name))
		} else if err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// hasData reports whether a data directory has etcd's log. Where it has not, etcd was stopped before it began, or never
// ran.
func hasData(dir string) (bool, error) {
	entries, err := os.ReadDir(filepath.Join(dir, "member", "wal"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return filepath.Ext(e.Name()) == ".wal" }), err
}

const (
	// silentFor is how many times in a row it has to be known of all others that they do not serve before this member begins
	// with nothing, or with a snapshot: after a power cut nodes refuse connections until their pods are there. It is no more
	// since each first install waits as long.
	silentFor = 10
	// restoreAfter is how many times those are asked that do not answer before a restore goes on without: their nodes may be
	// gone for good. Where a node is off each time takes answerTimeout and pause: three minutes.
	restoreAfter = 30
)

// lookEvery is between two looks at the CAs.
var lookEvery = time.Minute

// pause is between two times that the others are asked.
var pause = time.Second

// begin makes the data directory ready for a start: as that of a member of a new cluster, of one that is restored, or of
// one that the others have.
func (m *member) begin(ctx context.Context, cfg *embed.Config) error {
	if err := os.MkdirAll(filepath.Dir(m.dataDir), 0o700); err != nil {
		return err
	}
	if has, err := hasData(m.dataDir); has || err != nil {
		return err // nil: it has begun
	}
	if err := errors.Join(m.isAtHome(), m.clear()); err != nil {
		return err
	}
	urls, err := m.urls()
	if err != nil {
		return err
	}
	silent, warn := 0, 0
	for n := 0; ; n++ {
		answers, unknown, err := m.ask(ctx, cfg)
		if err != nil {
			return err
		}
		if silent++; len(answers) > 0 || unknown != nil {
			silent = 0
		}
		begin := len(answers) > 0 || silent >= silentFor || len(urls) == 1
		switch by, err := m.begun(cfg, answers); {
		case err != nil:
			return err
		case by != "" && m.restore != "":
			return fmt.Errorf("--restore-from %s: %s is of a cluster that runs: where that one is to go on, leave the option out (etcd.bundled.restoreFrom=), and "+
				"this member joins it; to restore, stop all members and move their data away", m.restore, by)
		case by != "":
			return m.join(ctx, cfg, answers)
		case m.restore == "" && begin:
			return nil
		case m.restore != "" && (begin || n >= restoreAfter):
			return m.restoreData(cfg)
		}
		if unknown != nil && n >= warn {
			warn = n + 30
			cfg.GetLogger().Warn("waiting for the other members: this one has no data, and begins when it knows whether they have", zap.Error(unknown))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// clear moves what etcd left of a start in which it did not come to a log out of the way.
func (m *member) clear() error {
	if _, err := m.moveAway("without-log"); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// moveAway gives what etcd has written another name, beside its place, and says which.
func (m *member) moveAway(as string) (to string, err error) {
	to = filepath.Join(m.dataDir, as+"-"+time.Now().UTC().Format("20060102T150405.000Z"))
	return to, os.Rename(filepath.Join(m.dataDir, "member"), to)
}

// restoreData makes data of the snapshot, beside its place, and moves it there when it is whole: a member must not begin
// with half of it.
func (m *member) restoreData(cfg *embed.Config) error {
	half := strings.TrimSuffix(m.dataDir, "/") + ".restoring"
	if err := errors.Join(os.RemoveAll(half), os.MkdirAll(m.dataDir, 0o700)); err != nil {
		return err
	}
	err := snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
		SnapshotPath: m.restore, Name: m.name, OutputDataDir: half, PeerURLs: []string{cfg.AdvertisePeerUrls[0].String()},
		InitialCluster: m.initialCluster, InitialClusterToken: cfg.InitialClusterToken,
		// So agents know that it is another etcd, and every watch begins anew.
		RevisionBump: 1 << 30, MarkCompacted: true,
	})
	if err != nil {
		return fmt.Errorf("restoring --restore-from %s: %w", m.restore, err)
	}
	if err := os.Rename(filepath.Join(half, "member"), filepath.Join(m.dataDir, "member")); err != nil {
		return err
	}
	_ = os.Remove(half) // an empty folder
	return nil
}
