package store

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// DefaultPrefix is what every key begins with unless Config says otherwise.
	DefaultPrefix = "/egret/"
	// DefaultDialTimeout is how long Dial tries unless Config says otherwise.
	DefaultDialTimeout = 5 * time.Second
	// DefaultMemberInterval is how often etcd's members are asked for unless Config says otherwise.
	DefaultMemberInterval = time.Minute

	// requestTimeout bounds each request but lists, whose answers may be large: without it the etcd client waits for a
	// connection for as long as its caller does.
	requestTimeout = 5 * time.Second
	listTimeout    = 30 * time.Second
	// maxTxnOps is how many operations a Txn may have. etcd takes 128 unless told otherwise (--max-txn-ops), and counts
	// the comparisons on their own; the rest is for the fencing token and for rounding.
	maxTxnOps = 120
	// maxResponse is the largest answer that the client takes: a list of everything. etcd itself sets no bound.
	maxResponse = 512 << 20
)

// Config says which etcd to speak to.
type Config struct {
	Endpoints []string    // host:port, or URLs
	Prefix    string      // what every key begins with; empty: DefaultPrefix; a slash at its end is added
	TLS       *tls.Config // nil: no TLS, unless an endpoint is an https URL
	// ReadTLS returns what TLS is to be at each further connection; nil: as it is.
	ReadTLS func() (*tls.Config, error)
	// Username and Password are for etcd's own authentication. It costs etcd a password check for each renewal of a
	// lease: prefer client certificates.
	Username, Password string
	DialTimeout        time.Duration // how long Dial tries; 0: DefaultDialTimeout
	// how often etcd's members are asked for, to reach them too; 0: soon after Dial, and then each
	// DefaultMemberInterval
	MemberInterval time.Duration
	// Relayed says that the one endpoint leads to some member of etcd. The others cannot be asked, so nothing is
	// concluded from their silence.
	Relayed bool
	Log     *slog.Logger // nil: nothing is logged
	// By is the person for whom the Client moves, pins and cordons, as the records of that say; empty: it does so for
	// no person, and writes none.
	By string
}

// Client speaks to etcd. It is safe for concurrent use.
type Client struct {
	etcd    *clientv3.Client
	prefix  string
	log     *slog.Logger
	by      string
	relayed bool
	caches  atomic.Int64 // how many were made: each has a watch stream of its own
	heads   heads
	// the revision that etcd had when it last answered Confirm or a cache's list, or a later one that it has shown since
	newest    atomic.Int64
	watchLost atomic.Bool // a cache has lost its watch of etcd, and logged that
	full      atomic.Bool // see NoSpace
	wg        sync.WaitGroup
}

// raise notes that etcd has got to a revision. It is that of one member, which may be behind the others.
func (c *Client) raise(revision int64) {
	for {
		was := c.newest.Load()
		if revision <= was || c.newest.CompareAndSwap(was, revision) {
			return
		}
	}
}

// ErrNoAnswer says that etcd has not answered in time.
var ErrNoAnswer = errors.New("no answer of etcd")

// noAnswer is ErrNoAnswer with what was the matter.
type noAnswer struct{ error }

func (noAnswer) Is(target error) bool { return target == ErrNoAnswer }
func (e noAnswer) Unwrap() error      { return e.error }

// Dial connects to etcd and returns when etcd has answered. It tries for Config.DialTimeout, since etcd may be on its
// way up; an error names the endpoints and the last reason, and is ErrNoAnswer unless etcd refused user or password.
// The Client lives until Close, not until ctx ends.
func Dial(ctx context.Context, cfg Config) (*Client, error) {
	prefix := cmp.Or(cfg.Prefix, DefaultPrefix)
	if !strings.HasSuffix(prefix, "/") {
		prefix += "/"
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	timeout := cmp.Or(cfg.DialTimeout, DefaultDialTimeout)
	c := &Client{prefix: prefix, log: log, by: cfg.By, relayed: cfg.Relayed}
	var err error
	options := []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
		// gRPC waits up to 120 s before it connects again, and 20 s for a connection: longer than any lease.
		Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
		MinConnectTimeout: 3 * time.Second,
	}), grpc.WithChainStreamInterceptor(withhold)}
	if cfg.TLS != nil && cfg.ReadTLS != nil {
		options = append(options, grpc.WithTransportCredentials(Reloading(cfg.ReadTLS)))
	}
	c.etcd, err = clientv3.New(clientv3.Config{
		Context: context.WithoutCancel(ctx), Endpoints: cfg.Endpoints, TLS: cfg.TLS, Username: cfg.Username, Password: cfg.Password,
		DialTimeout: timeout, MaxCallRecvMsgSize: maxResponse,
		// What is wrong comes back as errors; the client's own log would say it a second time, in another form.
		Logger: zap.NewNop(),
		// 10 s is the least that gRPC sends. The timeout is TCP_USER_TIMEOUT as well, so a renewal that is not
		// acknowledged ends the connection after 3 s, and a lease of 10 s leaves time for a new one.
		DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 3 * time.Second,
		DialOptions: options,
	})
	if err == nil {
		if err = c.probe(ctx, timeout); err != nil {
			if culprit(err) == "--endpoints" {
				err = noAnswer{err}
			}
			_ = c.etcd.Close() // it says no more than that it was closed
		}
	}
	if err != nil {
		return nil, fmt.Errorf("connecting to etcd at %s: %w: check %s", strings.Join(cfg.Endpoints, ","), err, culprit(err))
	}
	c.wg.Go(func() { c.followMembers(cfg) })
	return c, nil
}

// culprit names the flags that an error of Dial points at.
func culprit(err error) string {
	for _, auth := range []error{rpctypes.ErrAuthFailed, rpctypes.ErrUserEmpty, rpctypes.ErrPermissionDenied, rpctypes.ErrUserNotFound} {
		if errors.Is(err, auth) {
			return "--user"
		}
	}
	return "--endpoints"
}

// probe returns when etcd has answered a read. Unlike the requests of clientv3, which wait for a connection and then
// know nothing but that time is up, its own fail at once and say why.
func (c *Client) probe(ctx context.Context, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	kv := pb.NewKVClient(c.etcd.ActiveConnection())
	var last error
	for {
		_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(c.prefix), Limit: 1}, grpc.WaitForReady(false))
		if err == nil {
			return nil
		}
		if code := status.Code(err); last == nil || code != codes.DeadlineExceeded && code != codes.Canceled {
			last = cause(err)
		}
		if culprit(last) != "--endpoints" || !sleep(ctx, 100*time.Millisecond) {
			return last
		}
	}
}

// cause returns etcd's own error, or what gRPC says without its decoration.
func cause(err error) error {
	if err = rpctypes.Error(err); errors.As(err, new(rpctypes.EtcdError)) {
		return err
	}
	if s, ok := status.FromError(err); ok {
		return errors.New(s.Message())
	}
	return err
}

// Close ends all connections. Watches, caches and leaderships of the Client end with it; leases stay until their time
// is up.
func (c *Client) Close() error {
	defer c.wg.Wait()
	if err := c.etcd.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("closing the connection to etcd: %w", err)
	}
	return nil
}

// Etcd returns the client that it is made of. Its keys are the whole ones, prefix included.
func (c *Client) Etcd() *clientv3.Client { return c.etcd }

// Prefix returns what every key in etcd begins with, the slash at its end included.
func (c *Client) Prefix() string { return c.prefix }

func (c *Client) key(k string) string { return c.prefix + k }

// txn runs one transaction.
func (c *Client) txn(ctx context.Context, ifs []clientv3.Cmp, then, otherwise []clientv3.Op) (*clientv3.TxnResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := c.etcd.Txn(ctx).If(ifs...).Then(then...).Else(otherwise...).Commit()
	if errors.Is(err, rpctypes.ErrNoSpace) {
		c.reportFull(true)
	}
	return resp, err
}

// sleep waits for d; false: ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
