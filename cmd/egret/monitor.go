package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/pflag"

	"github.com/egret-project/egret/monitor"
)

// monitorFlags are the options of both daemons for what is asked of them while they run.
type monitorFlags struct{ monitor.Config }

func (f *monitorFlags) add(s *pflag.FlagSet, port int) {
	s.StringVar(&f.Local, "status-address", fmt.Sprintf("127.0.0.1:%d", port), "loopback address and port of /healthz, /readyz and /metrics, for the node's own processes; empty: none")
	s.StringVar(&f.Remote, "metrics-address", "", "address and port of /metrics for others, over TLS, like 10.0.0.1:8481; clients have to show a certificate (default: none)")
	s.StringVar(&f.TLS.Cert, "metrics-cert-file", "", "file of the certificate of --metrics-address; it is read again when it is replaced")
	s.StringVar(&f.TLS.Key, "metrics-key-file", "", "file of that certificate's key")
	s.StringVar(&f.TLS.ClientCA, "metrics-client-ca-file", "", "file of the CA certificates that clients of --metrics-address have a certificate of")
}

// server returns what serves status, and where metrics are registered.
func (f *monitorFlags) server(log *slog.Logger, level *monitor.LogLevel) (*monitor.Server, *prometheus.Registry) {
	cfg, metrics := f.Config, prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "egret_build_info", Help: "1, by the version of the program.", ConstLabels: prometheus.Labels{"version": version},
	})
	info.Set(1)
	metrics.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	cfg.Metrics, cfg.Log, cfg.Level = metrics, log, level
	return monitor.New(cfg), metrics
}

// waitsForEtcd is what a daemon says until it has registered a check of its own: one without any would be ready.
func waitsForEtcd() error { return errors.New("etcd has not answered yet: see the log") }

// serving serves status from before a daemon runs until it has ended, also while it says its last words.
func serving(ctx context.Context, s *monitor.Server, daemon func() error) error {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	err := daemon()
	stop()
	<-done // it ends without an error
	return err
}
