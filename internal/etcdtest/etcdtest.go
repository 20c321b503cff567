package etcdtest

import (
	"context"
	"net/url"
	"os"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// startTimeout is how long a server may take to start: 0.3 s is usual, the rest is for a busy machine.
const startTimeout = 30 * time.Second

// Server is one etcd server, a cluster of its own. Its methods are for the goroutine of the test.
type Server struct {
	t      testing.TB
	dir    string
	etcd   *embed.Etcd // nil while stopped
	relay  *relay
	client *clientv3.Client
}

// New starts a server that runs until the test ends. The test fails when it cannot start.
func New(t testing.TB) *Server {
	t.Helper()
	s := &Server{t: t, dir: t.TempDir()}
	var err error
	if s.relay, err = newRelay(); err != nil {
		t.Fatalf("listening for clients of etcd: %v", err)
	}
	t.Cleanup(s.close)
	s.Start()
	return s
}

// Endpoint returns the address that clients dial, 127.0.0.1:port.
func (s *Server) Endpoint() string { return s.relay.addr() }

// URL returns the endpoint as a URL.
func (s *Server) URL() string { return "http://" + s.Endpoint() }

// Start starts the server with the data that it had when it was stopped, and returns when it serves.
func (s *Server) Start() {
	s.t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = s.dir
	local := url.URL{Scheme: "http", Host: "127.0.0.1:0"} // nobody but the relay has to know the port
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{local}, []url.URL{local}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{local}, []url.URL{local}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.UnsafeNoFsync = true
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		s.t.Fatalf("starting etcd: %v", err)
	}
	select {
	case <-e.Server.ReadyNotify():
	case err := <-e.Err():
		s.t.Fatalf("starting etcd: %v", err)
	case <-time.After(startTimeout):
		e.Close()
		s.t.Fatalf("etcd did not start within %v", startTimeout)
	}
	s.etcd = e
	s.relay.target(e.Clients[0].Addr().String())
}

// Stop stops the server; its data stays. Clients lose their connections and get no new ones.
func (s *Server) Stop() {
	if s.etcd == nil {
		return
	}
	// Close waits for every open stream, seven seconds for a watch. Without connections there are no streams.
	s.relay.target("")
	s.closeClient()
	s.etcd.Close()
	s.etcd = nil
}

// Restart stops and starts the server.
func (s *Server) Restart() {
	s.t.Helper()
	s.Stop()
	s.Start()
}

// Backup restarts the server and returns a function that brings its data back as they are now, as an operator does after a loss. The
// server runs afterwards.
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

// Cut closes all connections of clients and lets none come back until Mend: "connection reset", then "connection closed".
func (s *Server) Cut() { s.relay.set(cut) }

// Freeze keeps all connections and passes nothing on until Mend: an etcd, or a network, that does not answer.
func (s *Server) Freeze() { s.relay.set(frozen) }

// Mend ends what Cut and Freeze began. What was sent to a frozen server arrives then.
func (s *Server) Mend() { s.relay.set(open) }

// Client returns a client that is not affected by Cut and Freeze. The server closes it.
func (s *Server) Client() *clientv3.Client {
	s.t.Helper()
	if s.client == nil {
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.etcd.Clients[0].Addr().String()}, Logger: zap.NewNop()})
		if err != nil {
			s.t.Fatalf("connecting to etcd: %v", err)
		}
		s.client = c
	}
	return s.client
}

// Compact makes etcd forget all history before its present revision: a watch from an earlier one fails.
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

func (s *Server) close() {
	s.Stop()
	s.closeClient()
	s.relay.close()
}
