package lab

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"
)

// How long things may take before a lab gives up. On 2 cores the API server takes 5 s, everything else less than one; a
// loaded machine may take ten times that.
const (
	readyTimeout = 60 * time.Second
	downTimeout  = 30 * time.Second
	// stopGrace is for a process whose data is kept.
	stopGrace = 10 * time.Second
	// downGrace is for one whose data is thrown away.
	downGrace = time.Second
)

// Up builds a lab and returns when all of it is ready, every agent alive. The lab stays until Down, also when this
// process ends. What Up began is removed again when it fails or when ctx ends first; an error of a process shows the
// end of its log. A lab of the name that is there already is an error.
func Up(ctx context.Context, cfg Config) (*Lab, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := cfg.prerequisites(); err != nil {
		return nil, err
	}
	held, err := lock(ctx, cfg.Name)
	if err != nil {
		return nil, err
	}
	defer held.Close()
	l := &Lab{cfg: cfg, dir: filepath.Join(root, cfg.Name)}
	if _, err := os.Stat(l.dir); !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("lab %q exists already: remove it with: %s", cfg.Name, downCommand(cfg.Name))
	}
	if err := l.up(ctx, held); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), downTimeout) // ctx may be what ended
		defer cancel()
		return nil, errors.Join(err, l.remove(undo, nil))
	}
	return l, nil
}

func (l *Lab) up(ctx context.Context, held *os.File) error {
	for _, dir := range []string{"pids", "logs"} {
		if err := os.MkdirAll(l.path(dir), 0o700); err != nil {
			return err
		}
	}
	s := &state{Config: l.cfg, Token: rand.Text(), lock: held}
	var listeners []*os.File
	var relays []int
	for range len(l.relayed()) {
		ln, port, err := listen()
		if err != nil {
			return err
		}
		defer ln.Close()
		listeners, relays = append(listeners, ln), append(relays, port)
	}
	s.Ports = ports{API: relays[0], Etcd: relays[1:]}
	l.ports, l.cluster = s.Ports, &kubeConfig{port: s.Ports.API, token: s.Token, ca: l.path("ca.crt")}
	if err := errors.Join(l.write(s), l.writeKubeFiles(), l.writeGossipKey(), l.buildLAN()); err != nil {
		return err
	}
	l.cfg.Log.Info("starting etcd and the API server")
	if err := l.start(s, l.serve(), listeners...); err != nil {
		return err
	}
	for _, c := range append(l.etcds(), l.kubeEtcd(), l.apiServer()) {
		if err := l.start(s, c); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return l.upCluster(gctx, s) })
	g.Go(func() error { return l.upNodes(gctx, s) })
	if err := g.Wait(); err != nil {
		return err
	}
	if l.cfg.Kubelet {
		// not before the lab has created the Node objects, for a kubelet would, without pod CIDRs
		for _, n := range l.nodes() {
			if err := l.startKubelet(s, n); err != nil {
				return err
			}
		}
		if err := l.waitKubelets(ctx); err != nil {
			return err
		}
		if l.cfg.flannel() {
			if err := l.waitFlannel(ctx); err != nil {
				return err
			}
		}
		l.cfg.Log.Info("kubelets are ready")
	}
	if !l.cfg.Bare {
		if err := l.waitAgents(ctx, l.nodes()...); err != nil {
			return err
		}
		l.cfg.Log.Info("agents are alive")
	}
	s.Ready = true
	return l.write(s)
}

// gossipKey is the file of the key that all agents gossip with.
const gossipKey = "gossip.key"

func (l *Lab) writeGossipKey() error {
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	return writeFile(l.path(gossipKey), []byte(base64.StdEncoding.EncodeToString(key)))
}

// listen takes a free port of the machine for a relay. The socket goes to `serve` as it is: no other program can take
// the port.
func listen() (*os.File, int, error) {
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, 0, err
	}
	defer ln.Close() // File duplicates it
	f, err := ln.File()
	return f, ln.Addr().(*net.TCPAddr).Port, err
}

// upCluster brings the Kubernetes side up: nodes, CRDs, crdsync.
func (l *Lab) upCluster(ctx context.Context, s *state) error {
	begin := time.Now()
	if err := l.waitAPI(ctx); err != nil {
		return err
	}
	l.cfg.Log.Info("API server is ready", "dur", time.Since(begin).Round(time.Millisecond))
	if err := l.createNodes(ctx); err != nil {
		return err
	}
	if l.cfg.Kubelet {
		for _, c := range l.controllers() {
			if err := l.start(s, c); err != nil {
				return err
			}
		}
		return nil
	}
	if err := l.createCRDs(ctx); err != nil {
		return err
	}
	if l.cfg.Bare {
		return nil
	}
	l.cfg.Log.Info("CRDs are established, starting crdsync")
	if l.cfg.NoWebhook {
		return l.start(s, l.crdsync())
	}
	if err := l.createWebhook(ctx); err != nil {
		return err
	}
	if err := l.start(s, l.crdsync()); err != nil {
		return err
	}
	return l.waitWebhook(ctx)
}

// upNodes brings the nodes up, and their agents as soon as etcd answers.
func (l *Lab) upNodes(ctx context.Context, s *state) error {
	for _, n := range l.nodes() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := l.buildNode(n); err != nil {
			return err
		}
	}
	if err := l.waitEtcd(ctx); err != nil {
		return err
	}
	l.cfg.Log.Info("nodes are built, etcd is ready")
	if l.cfg.Bare {
		return nil
	}
	for _, n := range l.nodes() {
		if err := l.start(s, l.agent(NodeName(n))); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) waitEtcd(ctx context.Context) error {
	return l.wait(ctx, "etcd", readyTimeout, append(l.EtcdMembers(), serveProc), func(ctx context.Context) error {
		var errs []error
		for _, e := range l.EtcdEndpoints() {
			errs = append(errs, get(ctx, http.DefaultClient, "http://"+e+"/health"))
		}
		return errors.Join(errs...)
	})
}

func (l *Lab) waitAPI(ctx context.Context) error {
	client, err := rest.HTTPClientFor(l.cluster.rest())
	if err != nil {
		return fmt.Errorf("making a client of the API server: %w", err)
	}
	defer client.CloseIdleConnections()
	return l.wait(ctx, "the API server", readyTimeout, []string{serveProc, kubeEtcdProc, apiProc}, func(ctx context.Context) error {
		return get(ctx, client, l.cluster.rest().Host+"/readyz")
	})
}

// get succeeds when url answers 200.
func get(ctx context.Context, client *http.Client, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second) // what is not ready may take the connection and say nothing
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Close = true
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 300)) // only explains the status
		return fmt.Errorf("%s: %s: %s", url, resp.Status, body)
	}
	return nil
}

// Down removes the lab of that name, whatever its state: nil when there is none. It returns when all processes are
// gone.
func Down(ctx context.Context, name string) error {
	held, err := lock(ctx, name)
	if err != nil {
		return err
	}
	defer held.Close()
	l, s, err := load(name)
	if errors.Is(err, ErrNoLab) {
		// its start was interrupted before it made anything
		l = &Lab{cfg: Config{Name: name}, dir: filepath.Join(root, name)}
	} else if err != nil {
		return err
	}
	return l.remove(ctx, s)
}

// Down removes the lab. It returns when all its processes are gone.
func (l *Lab) Down(ctx context.Context) error { return Down(ctx, l.cfg.Name) }

// DownAfter is Down for defer: it removes the lab within a minute also when ctx has ended, and joins what goes wrong to
// *err.
func (l *Lab) DownAfter(ctx context.Context, err *error) {
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	*err = errors.Join(*err, l.Down(end))
}

// remove removes what is in the state, and the lock file. The caller holds the lock.
func (l *Lab) remove(ctx context.Context, s *state) error {
	var g errgroup.Group
	for _, name := range l.processes() {
		g.Go(func() error { return l.stop(ctx, name, downGrace) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	var hosts []string
	if s != nil {
		for pod := range s.Pods {
			hosts = append(hosts, podNetns(pod))
		}
	}
	for _, n := range l.nodes() {
		hosts = append(hosts, NodeName(n))
	}
	var errs []error
	for _, h := range l.hosts() {
		hosts = append(hosts, h.name)
	}
	for _, h := range append(hosts, "lan") {
		errs = append(errs, l.removeHost(h))
	}
	errs = append(errs, l.removeCgroups(ctx))
	if err := errors.Join(errs...); err != nil {
		return err // the folder stays, for the next try
	}
	if err := os.RemoveAll(l.dir); err != nil {
		return err
	}
	return unlink(l.cfg.Name)
}
