package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/egret-project/egret/cmd/egret/config"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// etcdFlags are the flags that every command shares. They are named as etcdctl names them, and take their values from
// its environment variables, ETCDCTL_ENDPOINTS and so on, where they are not given; what etcdctl does not know, from
// EGRET_ETCD_PREFIX and EGRET_ETCD_SERVER_NAME.
type etcdFlags struct {
	endpoints          []string
	prefix             string
	cacert, cert, key  string
	serverName         string
	insecureSkipVerify bool
	insecure           bool
	user, password     string
	dialTimeout        time.Duration
	acts               bool         // the command does something for a person, who is named
	cluster            clusterFlags // of operators' commands alone
}

// addOperator is add, for the commands of operators: they may reach etcd through the cluster, too.
func (f *etcdFlags) addOperator(s *pflag.FlagSet) {
	f.add(s)
	f.cluster.add(s)
}

func (f *etcdFlags) add(s *pflag.FlagSet) {
	s.StringSliceVar(&f.endpoints, "endpoints", []string{"127.0.0.1:2379"}, "etcd endpoints, comma separated")
	e := s.Lookup("endpoints")
	e.Value = endpointsValue{e.Value, e.Value.(pflag.SliceValue)}
	s.StringVar(&f.prefix, "etcd-prefix", "/egret/", "what every key in etcd begins with")
	s.StringVar(&f.cacert, "cacert", "", "file of the CA certificates that etcd's certificate is checked against")
	s.StringVar(&f.cert, "cert", "", "file of the client certificate shown to etcd")
	s.StringVar(&f.key, "key", "", "file of the client certificate's key")
	s.StringVar(&f.serverName, "etcd-server-name", "", "name that etcd's certificate is to have (default: the host of the endpoint)")
	s.BoolVar(&f.insecureSkipVerify, "insecure-skip-tls-verify", false, "do not check etcd's certificate (tests only)")
	s.BoolVar(&f.insecure, "insecure", false, "go on without mTLS to etcd: agent and crdsync start without it, and --password is sent in the clear; for trials only")
	s.StringVar(&f.user, "user", "", "etcd user, as name or name:password")
	s.StringVar(&f.password, "password", "", "etcd password, when --user has none")
	s.DurationVar(&f.dialTimeout, "dial-timeout", 5*time.Second, "how long to wait for etcd's first answer")
}

// endpointsValue is the value of --endpoints: URLs as the chart makes them of a variable with the address of a Service
// are understood, too.
type endpointsValue struct {
	pflag.Value
	pflag.SliceValue
}

// Set adds endpoints, comma separated. A variable that Kubernetes did not expand is an error, with which the container
// ends: started again it has the Service's address, if that is there by then.
func (e endpointsValue) Set(text string) error {
	if _, name, ok := strings.Cut(text, "$("); ok {
		name, _, _ = strings.Cut(name, ")")
		return fmt.Errorf("%q: there was no variable %s when the container was started: the Service that it is of has to be there before", text, name)
	}
	all := strings.Split(text, ",")
	for i, one := range all {
		all[i] = store.Endpoint(one)
	}
	return e.Value.Set(strings.Join(all, ","))
}

// prefixes reads the values of a flag of addresses and prefix lengths.
func prefixes(flag string, texts []string) (out []netip.Prefix, err error) {
	for _, text := range texts {
		p, bad := netip.ParsePrefix(text)
		if bad != nil {
			err = errors.Join(err, fmt.Errorf("%s %q: want an address and a prefix length, like 192.168.0.0/16", flag, text))
			continue
		}
		out = append(out, p.Masked())
	}
	return out, err
}

// fromEnvironment sets the flags that etcdctl reads from its environment and that were not given.
func fromEnvironment(s *pflag.FlagSet) error {
	var errs []error
	for _, name := range []string{"endpoints", "etcd-prefix", "etcd-server-name", "cacert", "cert", "key", "insecure-skip-tls-verify", "user", "password", "dial-timeout"} {
		of := "ETCDCTL_"
		if strings.HasPrefix(name, "etcd-") {
			of = "EGRET_"
		}
		v := of + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		if value, ok := os.LookupEnv(v); ok && !s.Changed(name) {
			if err := s.Set(name, value); err != nil {
				errs = append(errs, fmt.Errorf("environment variable %s: %w", v, err))
			}
		}
	}
	return errors.Join(errs...)
}

// configured wraps the RunE of a command: environment and file are read first.
func configured(file *string, run func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		var err error
		if file != nil {
			err = config.Set(c.Flags(), *file)
		}
		if err := errors.Join(fromEnvironment(c.Flags()), err); err != nil {
			return err
		}
		return run(c, args)
	}
}

func (f *etcdFlags) dial(ctx context.Context, log *slog.Logger) (*store.Client, error) {
	if f.cluster.wanted() {
		return f.dialThrough(ctx, log)
	}
	t, err := f.tls()
	if err != nil {
		return nil, err
	}
	user, password, err := f.credentials(f.plain())
	if err != nil {
		return nil, err
	}
	c, err := store.Dial(ctx, store.Config{
		Endpoints: f.endpoints, Prefix: f.prefix, TLS: t, ReadTLS: f.tls, Username: user, Password: password,
		DialTimeout: f.dialTimeout, Log: log, By: f.by(t, ""),
	})
	if f.cluster.endpoints != nil && errors.Is(err, store.ErrNoAnswer) {
		err = fmt.Errorf("%w, or give --kubeconfig or --context to go through the cluster", err)
	}
	return c, err
}

// credentials returns etcd's user and password. plain is the endpoint that is spoken to without TLS, if there is one.
func (f *etcdFlags) credentials(plain string) (user, password string, err error) {
	user, password, _ = strings.Cut(f.user, ":")
	password = cmp.Or(password, f.password)
	if user != "" && password != "" && plain != "" && !f.insecure {
		return "", "", fmt.Errorf("--user %s: its password would go to %s in the clear: give https URLs, or --insecure", user, plain)
	}
	return user, password, nil
}

// by returns who runs a command, for records of what it does: user and host, before sudo, and the names that etcd is
// shown, and the Kubernetes API where it leads there; "": no name. It is what the command says of itself: whoever may
// write to etcd may write another.
func (f *etcdFlags) by(t *tls.Config, kubernetes string) string {
	if !f.acts {
		return ""
	}
	const most = 100 // bytes of a name: no long one hides another
	name := os.Getenv("SUDO_USER")
	if u, err := user.Current(); name == "" && err == nil {
		name = u.Username
	}
	host, _ := os.Hostname() // without one it is left out
	out := operator.Printable(cmp.Or(name, "uid "+strconv.Itoa(os.Getuid()))+"@"+cmp.Or(host, "-"), most)
	if kubernetes != "" {
		out += " (Kubernetes user " + operator.Printable(kubernetes, most) + ")"
	}
	if t != nil && len(t.Certificates) > 0 {
		out += " (certificate " + operator.Printable(t.Certificates[0].Leaf.Subject.String(), most) + ")"
	}
	if name, _, _ := strings.Cut(f.user, ":"); name != "" {
		out += " (etcd user " + operator.Printable(name, most) + ")"
	}
	return out
}

// await is dial for what runs for good: it goes on until etcd answers, or refuses.
func (f *etcdFlags) await(ctx context.Context, log *slog.Logger) (*store.Client, error) {
	for said := (time.Time{}); ; {
		c, err := f.dial(ctx, log)
		if ctx.Err() != nil || !errors.Is(err, store.ErrNoAnswer) {
			return c, err
		}
		if time.Since(said) > time.Minute {
			said = time.Now()
			log.Error("cannot begin without etcd, will retry", "err", err)
		}
	}
}

// tls returns nil when no flag and no endpoint asks for TLS. It is asked again at each connection: certificates that
// were replaced need no restart.
func (f *etcdFlags) tls() (*tls.Config, error) {
	if !f.wantsTLS() {
		return nil, nil
	}
	return f.readTLS()
}

// readTLS reads the files that the flags name.
func (f *etcdFlags) readTLS() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: f.insecureSkipVerify, ServerName: f.serverName}
	if f.cacert != "" {
		roots, err := monitor.ReadCAs("--cacert", f.cacert)
		if err != nil {
			return nil, err
		}
		c.RootCAs = roots
	}
	if (f.cert == "") != (f.key == "") {
		return nil, fmt.Errorf("--cert and --key belong together: only one of them is given")
	}
	if f.cert != "" {
		pair, err := tls.LoadX509KeyPair(f.cert, f.key)
		if err != nil {
			return nil, fmt.Errorf("reading --cert and --key: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// logFlags are the options of the daemons for their logs.
type logFlags struct{ level, format string }

func (f *logFlags) add(s *pflag.FlagSet) {
	s.StringVar(&f.level, "log-level", "info", "debug, info, warn or error; egret log-level changes it for a while")
	s.StringVar(&f.format, "log-format", "text", "text or json, a line for each")
}

// logger returns the logger of a daemon, which writes to w, and its level.
func (f *logFlags) logger(w io.Writer) (*slog.Logger, *monitor.LogLevel, error) {
	var l slog.Level
	var errs []error
	if err := l.UnmarshalText([]byte(f.level)); err != nil {
		errs = append(errs, fmt.Errorf("--log-level %q: want debug, info, warn or error", f.level))
	}
	level := monitor.NewLogLevel(l)
	options := &slog.HandlerOptions{Level: level}
	handlers := map[string]slog.Handler{"text": slog.NewTextHandler(w, options), "json": slog.NewJSONHandler(w, options)}
	if handlers[f.format] == nil {
		errs = append(errs, fmt.Errorf("--log-format %q: want text or json", f.format))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, nil, err
	}
	return slog.New(handlers[f.format]), level, nil
}
