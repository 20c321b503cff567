package etcdtest

import (
	"cmp"
	"context"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// startTimeout is how long a server may take to start: 0.3 s is usual, the rest is for a busy machine.
const startTimeout = 30 * time.Second

// Server is one etcd server, a cluster of its own or a member of a Cluster. Its methods are for the goroutine of the
// test.
type Server struct {
	t       testing.TB
	name    string
	cluster string // the members that it starts with, name=URL
	state   string // embed.ClusterStateFlagNew, or Existing
	dir     string
	options []func(*embed.Config)
	sockets string      // the folder of those at which etcd listens
	etcd    *embed.Etcd // nil while stopped
	calls   calls
	// MaxRequestBytes is how large a request may be from the next Start on; 0: etcd's default.
	MaxRequestBytes uint
	relay           *relay // of its clients
	peers           *relay // of the other members
	client          *clientv3.Client
}

// New starts a server that runs until the test ends, with its configuration changed by the options. The test fails when
// it cannot start.
func New(t testing.TB, options ...func(*embed.Config)) *Server {
	t.Helper()
	s := newServer(t, "default", options)
	s.cluster = s.member()
	s.Start()
	return s
}

// newServer returns a server that is not started.
func newServer(t testing.TB, name string, options []func(*embed.Config)) *Server {
	t.Helper()
	s := &Server{t: t, name: name, options: options, state: embed.ClusterStateFlagNew, dir: t.TempDir()}
	var err error
	if s.sockets, err = os.MkdirTemp("", "etcd"); err != nil { // t.TempDir is too long for a socket's path
		t.Fatalf("making a folder for etcd: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(s.sockets) }) // what stays is in the folder for such
	for _, r := range []**relay{&s.relay, &s.peers} {
		if *r, err = newRelay(); err != nil {
			t.Fatalf("listening for etcd: %v", err)
		}
		t.Cleanup((*r).close)
	}
	t.Cleanup(s.Stop)
	return s
}

// member returns the server as the configuration of a cluster names it.
func (s *Server) member() string { return s.name + "=http://" + s.peers.addr() }

// Endpoint returns the address that clients dial, 127.0.0.1:port.
func (s *Server) Endpoint() string { return s.relay.addr() }

// URL returns the endpoint as a URL.
func (s *Server) URL() string { return "http://" + s.Endpoint() }

// Start starts the server with the data that it had when it was stopped, and returns when it serves.
func (s *Server) Start() {
	s.t.Helper()
	s.launch()
	s.await()
}

// launch starts the server. One of a cluster serves once there are enough others.
func (s *Server) launch() {
	s.t.Helper()
	at := func(scheme, host string) []url.URL { return []url.URL{{Scheme: scheme, Host: host}} }
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.InitialCluster, cfg.ClusterState = s.name, s.dir, s.cluster, s.state
	// The relays have the ports, for as long as the test lasts: a port of etcd's own could become somebody else's while
	// etcd is stopped.
	clients, peers := filepath.Join(s.sockets, "clients"), filepath.Join(s.sockets, "peers")
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = at("unix", clients), at("http", s.relay.addr())
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = at("unix", peers), at("http", s.peers.addr())
	cfg.StrictReconfigCheck = false // it refuses new members for 5 s after another came
	cfg.UnsafeNoFsync = true
	cfg.MaxRequestBytes = cmp.Or(s.MaxRequestBytes, cfg.MaxRequestBytes)
	cfg.GRPCAdditionalServerOptions = s.calls.options()
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	for _, o := range s.options {
		o(cfg)
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		s.t.Fatalf("starting etcd: %v", err)
	}
	s.etcd = e
	s.peers.target(peers)
	s.relay.target(clients)
}

// await returns when the server serves.
func (s *Server) await() {
	s.t.Helper()
	select {
	case <-s.etcd.Server.ReadyNotify():
	case err := <-s.etcd.Err():
		s.t.Fatalf("starting etcd: %v", err)
	case <-time.After(startTimeout):
		s.t.Fatalf("etcd did not start within %v", startTimeout)
	}
}

// Stop kills the server; its data stays. Clients lose their connections and get no new ones. A leader leaves no
// successor.
func (s *Server) Stop() {
	if s.etcd == nil {
		return
	}
	// Close waits for every open stream, seven seconds for a watch. Without connections there are no streams.
	s.relay.target("")
	s.peers.target("")
	s.closeClient()
	s.calls.Lock()
	defer s.calls.Unlock()
	s.etcd.Server.HardStop() // Close alone hands the lead over
	s.etcd.Close()
	s.etcd = nil
}

// Restart stops and starts the server.
func (s *Server) Restart() {
	s.t.Helper()
	s.Stop()
	s.Start()
}

// Backup restarts the server and returns a function that brings its data back as they are now, as an operator does
// after a loss. The server runs afterwards.
func (s *Server) Backup() (restore func()) {
	s.t.Helper()
	from := s.t.TempDir()
	s.Stop()
	if err := os.CopyFS(from, os.DirFS(s.dir)); err != nil {
		s.t.Fatalf("copying etcd's data: %v", err)
	}
	s.Start()
	return func() {
		s.t.Helper()
		s.Stop()
		s.dir = from
		s.Start()
	}
}

// Cut closes all connections of clients and lets none come back until Mend: "connection reset", then "connection
// closed".
func (s *Server) Cut() { s.relay.set(cut) }

// Freeze keeps all connections and passes nothing on until Mend: an etcd, or a network, that does not answer.
func (s *Server) Freeze() { s.relay.set(frozen) }

// Mend ends what Cut and Freeze began. What was sent to a frozen server arrives then.
func (s *Server) Mend() { s.relay.set(open) }

// Client returns a client that is not affected by Cut and Freeze. The server closes it.
func (s *Server) Client() *clientv3.Client {
	s.t.Helper()
	if s.client == nil {
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{"unix://" + filepath.Join(s.sockets, "clients")}, Logger: zap.NewNop()})
		if err != nil {
			s.t.Fatalf("connecting to etcd: %v", err)
		}
		s.client = c
	}
	return s.client
}

// Compact makes etcd drop all history before its present revision: a watch from an earlier one fails.
func (s *Server) Compact() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	resp, err := s.Client().Get(ctx, "/")
	if err != nil {
		s.t.Fatalf("reading the revision: %v", err)
	}
	if _, err := s.Client().Compact(ctx, resp.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		s.t.Fatalf("compacting to revision %d: %v", resp.Header.Revision, err)
	}
}

func (s *Server) closeClient() {
	if s.client != nil {
		s.client.Close() // it says no more than that it was closed
		s.client = nil
	}
}

// calls are those that a server answers: each holds it for reading. Who holds it for writing has seen the last one end,
// and no other one begins. HardStop closes the database, and etcd does not recover from a call that reads it then.
type calls struct{ sync.RWMutex }

func (c *calls) options() []grpc.ServerOption {
	hold := func(call func() error) error {
		if !c.TryRLock() {
			return status.Error(codes.Unavailable, "etcd stops")
		}
		defer c.RUnlock()
		return call()
	}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
			err = hold(func() error { resp, err = handle(ctx, req); return err })
			return resp, err
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			return hold(func() error { return handle(srv, stream) })
		}),
	}
}
