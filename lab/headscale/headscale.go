// SPDX-License-Identifier: Apache-2.0

package headscale

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/logger"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
)

const (
	// startTimeout is how long Headscale may take to answer. It takes less than a
	// second on an idle machine.
	startTimeout = time.Minute

	// stopTimeout is how long it may take to stop before it is killed.
	stopTimeout = 10 * time.Second

	// startAttempts is how many ports are tried, as another process may take a port
	// after it was chosen.
	startAttempts = 3
)

// The files of a server, relative to its folder. Headscale runs in that folder, and
// its configuration uses relative paths: the path of a socket is limited to about a
// hundred bytes, which the paths of test folders often exceed.
const (
	configFile = "config.yaml"
	derpFile   = "derp.yaml"
	policyFile = "policy.hujson"
	// recordsFile has further DNS records, which Headscale reads again when they change.
	recordsFile = "records.json"
	logFile     = "headscale.log"
)

// Config says how to run a tailnet.
type Config struct {
	// Binary is the Headscale to run. Default: the one that the lab has built.
	Binary string

	// Dir is the folder for everything that the server writes, including its log. It
	// is created if necessary, and stays when the server stops.
	Dir string

	// Policy is the tailnet's policy file. It may name users that do not exist yet.
	Policy []byte

	// BaseDomain is the domain of the nodes' names. Default: tailnet.example.
	BaseDomain string

	// Host is the address of this machine that Headscale, the relay and the STUN server
	// listen on. Nodes have to reach it. Default: 127.0.0.1.
	Host netip.Addr
}

// Server is a running Headscale with its DERP relay and STUN server.
type Server struct {
	dir     string
	binary  string
	host    netip.Addr
	url     string
	apiKey  string
	http    *http.Client
	derp    *derp
	stun    *stunServer
	process *process.Process
	log     *os.File

	policyMu sync.Mutex // held while the policy file is replaced
}

// Start starts a tailnet and waits until it answers. An error names the log file,
// which has the reason.
func Start(ctx context.Context, cfg Config) (_ *Server, err error) {
	if cfg.BaseDomain == "" {
		cfg.BaseDomain = "tailnet.example"
	}
	if cfg.Binary == "" {
		if cfg.Binary, err = components.Path("headscale"); err != nil {
			return nil, err
		}
	}
	if !cfg.Host.IsValid() {
		cfg.Host = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, fmt.Errorf("start headscale: %w", err)
	}
	s := &Server{
		dir:    cfg.Dir,
		binary: cfg.Binary,
		host:   cfg.Host,
		http:   &http.Client{Transport: &http.Transport{}, Timeout: time.Minute},
	}
	if err := s.start(ctx, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("start headscale: %w (log: %s)", err, s.LogPath()), s.Stop())
	}
	return s, nil
}

// start does the work of Start. If it fails, Start stops what it has started.
func (s *Server) start(ctx context.Context, cfg Config) (err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if s.log, err = os.OpenFile(s.LogPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	logf := log.New(s.log, "", log.LstdFlags).Printf
	if s.derp, err = startDERP(s.host, logger.WithPrefix(logf, "derp: ")); err != nil {
		return fmt.Errorf("derp: %w", err)
	}
	if s.stun, err = startSTUN(s.host, logger.WithPrefix(logf, "stun: ")); err != nil {
		return fmt.Errorf("stun: %w", err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, derpFile), derpMap(s.host, s.derp.port, s.stun.port()), 0o600); err != nil {
		return err
	}
	if err := s.writePolicy(cfg.Policy); err != nil {
		return err
	}
	if err := s.SetRecords(); err != nil {
		return err
	}

	for attempt := 1; ; attempt++ {
		err := s.startProcess(ctx, cfg)
		if err == nil {
			break
		}
		if attempt == startAttempts || !strings.Contains(err.Error(), syscall.EADDRINUSE.Error()) {
			return err
		}
	}
	return s.createAPIKey(ctx)
}

// startProcess starts Headscale on a free port and waits until it answers.
func (s *Server) startProcess(ctx context.Context, cfg Config) error {
	addr, err := freeAddr(s.host)
	if err != nil {
		return err
	}
	s.url = "http://" + addr
	config := fmt.Sprintf(configTemplate, s.url, addr, cfg.BaseDomain)
	if err := os.WriteFile(filepath.Join(s.dir, configFile), []byte(config), 0o600); err != nil {
		return err
	}
	offset, err := s.log.Seek(0, 2)
	if err != nil {
		return err
	}
	err = s.serve(ctx)
	if reason := s.lastLogLine(offset); err != nil && reason != "" {
		return fmt.Errorf("%w: %s", err, reason)
	}
	return err
}

// serve starts Headscale as configured and waits until it answers.
func (s *Server) serve(ctx context.Context) (err error) {
	cmd := s.command("serve")
	cmd.Stdout, cmd.Stderr = s.log, s.log
	if s.process, err = process.Start(cmd); err != nil {
		return err
	}
	return s.waitHealthy(ctx)
}

// Killed kills Headscale, calls f, and starts Headscale again with the same address
// and its stored state. It returns when Headscale answers, even if f ends its
// goroutine, as a failing test does.
func (s *Server) Killed(ctx context.Context, f func()) (err error) {
	s.process.Kill()
	s.http.CloseIdleConnections()
	defer func() {
		if startErr := s.serve(context.WithoutCancel(ctx)); startErr != nil {
			err = errors.Join(err, fmt.Errorf("restart headscale: %w", startErr))
		}
	}()
	f()
	return nil
}

// command returns a command that runs Headscale in the server's folder. It does not
// pass on the environment, as HEADSCALE_ variables override settings.
func (s *Server) command(args ...string) *exec.Cmd {
	cmd := exec.Command(s.binary, append([]string{"--config", configFile}, args...)...)
	cmd.Dir = s.dir
	cmd.Env = []string{"HOME=" + s.dir, "PATH=" + os.Getenv("PATH")}
	return cmd
}

// waitHealthy waits until Headscale answers.
func (s *Server) waitHealthy(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("no answer within %v", startTimeout))
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if s.healthy(ctx) {
			return nil
		}
		select {
		case <-tick.C:
		case <-s.process.Done():
			return fmt.Errorf("it ended: %w", s.process.Err())
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// healthy reports whether Headscale answers its health check.
func (s *Server) healthy(ctx context.Context) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/health", nil)
	if err != nil {
		return false
	}
	res, err := s.http.Do(req)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	return res.StatusCode == http.StatusOK
}

// createAPIKey creates the key for Headscale's HTTP API. Only the command line can
// do that, through the socket in the server's folder.
func (s *Server) createAPIKey(ctx context.Context) error {
	plain := s.command("apikeys", "create", "--output", "json")
	cmd := exec.CommandContext(ctx, plain.Path, plain.Args[1:]...)
	cmd.Dir, cmd.Env = plain.Dir, plain.Env
	cmd.Stderr = s.log
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("create api key: %w: %s", err, strings.TrimSpace(string(out)))
	}
	if err := json.Unmarshal(out, &s.apiKey); err != nil {
		return fmt.Errorf("create api key: read answer %q: %w", out, err)
	}
	return nil
}

// lastLogLine returns the last line logged since offset, or "".
func (s *Server) lastLogLine(offset int64) string {
	log, err := os.ReadFile(s.LogPath())
	if err != nil || int64(len(log)) < offset {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(log[offset:])), "\n")
	return lines[len(lines)-1]
}

// URL returns the URL at which nodes log in
// ([tailscale.com/tsnet.Server.ControlURL]).
func (s *Server) URL() string { return s.url }

// LogPath returns the log file of Headscale, the relay and the STUN server.
func (s *Server) LogPath() string { return filepath.Join(s.dir, logFile) }

// PolicyPath returns the policy file. Only SetPolicy writes it.
func (s *Server) PolicyPath() string { return filepath.Join(s.dir, policyFile) }

// SetPolicy replaces the policy file. If Headscale refuses the policy, SetPolicy
// returns the reason, and the old policy stays in force.
//
// Nodes learn of a new policy with a short delay: poll for the change.
func (s *Server) SetPolicy(ctx context.Context, policy []byte) error {
	s.policyMu.Lock()
	defer s.policyMu.Unlock()

	// Headscale reads the file again on SIGHUP, but reports errors only in its log.
	// So check the policy first: the check runs the same code with the existing
	// users and nodes.
	if err := s.call(ctx, http.MethodPost, "policy/check", map[string]string{"policy": string(policy)}, nil); err != nil {
		return fmt.Errorf("set policy: %w", err)
	}
	if err := s.writePolicy(policy); err != nil {
		return fmt.Errorf("set policy: %w", err)
	}
	if err := s.process.Signal(syscall.SIGHUP); err != nil {
		return fmt.Errorf("set policy: signal headscale: %w", err)
	}
	return nil
}

// writePolicy replaces the policy file atomically: a pending signal must not make
// Headscale read an incomplete file.
func (s *Server) writePolicy(policy []byte) error {
	if len(policy) == 0 {
		// Headscale ignores an empty file and keeps its policy.
		return errors.New("the policy is empty")
	}
	temp := s.PolicyPath() + ".new"
	if err := os.WriteFile(temp, policy, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, s.PolicyPath())
}

// SetRecords replaces the DNS records that the tailnet has besides the names of its nodes.
// The nodes learn them within a second.
func (s *Server) SetRecords(records ...tailcfg.DNSRecord) error {
	content, err := json.Marshal(slices.Concat([]tailcfg.DNSRecord{}, records)) // [] and not null
	if err != nil {
		return fmt.Errorf("set DNS records: %w", err)
	}
	// Headscale watches this very file. It keeps what it has until the content is whole.
	if err := os.WriteFile(filepath.Join(s.dir, recordsFile), content, 0o600); err != nil {
		return fmt.Errorf("set DNS records: %w", err)
	}
	return nil
}

// Stop stops Headscale and its servers and waits until they have ended.
func (s *Server) Stop() error {
	var errs []error
	if s.process != nil {
		errs = append(errs, s.process.Stop(stopTimeout))
	}
	if s.derp != nil {
		errs = append(errs, s.derp.stop())
	}
	if s.stun != nil {
		errs = append(errs, s.stun.stop())
	}
	if s.log != nil {
		errs = append(errs, s.log.Close())
	}
	s.http.CloseIdleConnections()
	s.process, s.derp, s.stun, s.log = nil, nil, nil, nil
	return errors.Join(errs...)
}

// freeAddr returns a free address on host. Another process may take it.
func freeAddr(host netip.Addr) (string, error) {
	ln, err := net.Listen("tcp", netip.AddrPortFrom(host, 0).String())
	if err != nil {
		return "", fmt.Errorf("find a free port: %w", err)
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}
