// SPDX-License-Identifier: Apache-2.0

// Package versitygw runs Versity's S3 gateway, which stores objects as files of a
// directory, behind a relay that can slow it down or cut it off.
package versitygw

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/pki"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
)

// The account that may do everything.
const (
	AccessKey = "recorder"
	SecretKey = "a secret of the lab"
)

// startTimeout is how long the gateway may take to answer.
const startTimeout = 30 * time.Second

// Server is a gateway, which can be killed and started again at the same address.
type Server struct {
	// URL is its address, and CA the file with the certificate of its authority.
	URL, CA string
	// Objects is the directory of its buckets.
	Objects string

	dir, binary string
	pool        *x509.CertPool
	front       *front
	process     *process.Process
}

// Start starts a gateway that keeps all it writes in dir.
func Start(ctx context.Context, dir string) (_ *Server, err error) {
	s := &Server{dir: dir, CA: filepath.Join(dir, "ca.pem"), Objects: filepath.Join(dir, "objects")}
	if s.binary, err = components.Path("versitygw"); err != nil {
		return nil, err
	}
	if err := s.issue(); err != nil {
		return nil, err
	}
	for _, path := range []string{s.Objects, filepath.Join(dir, "versions")} {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, err
		}
	}
	if s.front, err = listen(filepath.Join(dir, "s3.sock")); err != nil {
		return nil, err
	}
	s.URL = "https://" + s.front.ln.Addr().String()
	if err := s.Restart(ctx); err != nil {
		return nil, errors.Join(err, s.front.close())
	}
	return s, nil
}

// issue writes the certificates.
func (s *Server) issue() error {
	ca, err := pki.NewCA("versitygw")
	if err != nil {
		return err
	}
	cert, err := ca.Server()
	if err != nil {
		return err
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return err
	}
	s.pool = ca.Pool()
	return errors.Join(
		os.WriteFile(s.CA, ca.PEM(), 0o600),
		os.WriteFile(filepath.Join(s.dir, "cert.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}), 0o600),
		os.WriteFile(filepath.Join(s.dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600),
	)
}

// Restart starts the gateway after Kill, and waits until it answers.
func (s *Server) Restart(ctx context.Context) error {
	if err := os.Remove(s.front.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	log, err := os.OpenFile(filepath.Join(s.dir, "versitygw.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()             // the gateway has it
	cmd := exec.Command(s.binary, //nolint:noctx // Kill ends it
		"--port", s.front.socket, "--cert", filepath.Join(s.dir, "cert.pem"), "--key", filepath.Join(s.dir, "key.pem"), "--health", "/health",
		"posix", "--versioning-dir", filepath.Join(s.dir, "versions"), s.Objects)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID="+AccessKey, "ROOT_SECRET_ACCESS_KEY="+SecretKey)
	if s.process, err = process.Start(cmd); err != nil {
		return err
	}
	client := &http.Client{Transport: s.transport()}
	defer client.CloseIdleConnections()
	for deadline := time.Now().Add(startTimeout); ; time.Sleep(20 * time.Millisecond) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL+"/health", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err == nil {
			_ = resp.Body.Close()
			return nil
		}
		select {
		case <-s.process.Done():
			said, _ := os.ReadFile(log.Name())
			return fmt.Errorf("versitygw has ended: %w\n%s", errors.Join(s.process.Err(), err), said)
		default:
		}
		if time.Now().After(deadline) {
			s.Kill()
			return fmt.Errorf("versitygw does not answer (log: %s): %w", log.Name(), err)
		}
	}
}

func (s *Server) transport() *http.Transport {
	return &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: s.pool}}
}

// Kill kills the gateway, as if its machine had died. Its address stays.
func (s *Server) Kill() {
	s.process.Kill()
	s.front.cut()
}

// Stop stops the gateway for good.
func (s *Server) Stop() error {
	s.process.Kill()
	return s.front.close()
}

// SetRate limits what can be sent to the gateway on each connection, in bytes a second. 0
// is no limit.
func (s *Server) SetRate(rate int) {
	s.front.mu.Lock()
	defer s.front.mu.Unlock()
	s.front.rate = rate
}

// Client returns a client for the gateway's account.
func (s *Server) Client() (*minio.Client, error) {
	return minio.New(s.front.ln.Addr().String(), &minio.Options{
		Creds: credentials.NewStaticV4(AccessKey, SecretKey, ""), Secure: true, Transport: s.transport(), Region: "us-east-1",
	})
}

// front passes connections on to the gateway.
type front struct {
	ln     net.Listener
	socket string

	mu    sync.Mutex
	rate  int
	conns map[net.Conn]bool
}

func listen(socket string) (*front, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it does not block
	if err != nil {
		return nil, err
	}
	f := &front{ln: ln, socket: socket, conns: make(map[net.Conn]bool)}
	go func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			go f.relay(client)
		}
	}()
	return f, nil
}

func (f *front) relay(client net.Conn) {
	server, err := net.Dial("unix", f.socket) //nolint:noctx // it does not block
	if err != nil {
		_ = client.Close()
		return
	}
	f.mu.Lock()
	f.conns[client], f.conns[server] = true, true
	f.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { _, _ = io.Copy(server, limited{client, f}); _ = server.Close() })
	both.Go(func() { _, _ = io.Copy(client, server); _ = client.Close() })
	both.Wait()
	f.mu.Lock()
	delete(f.conns, client)
	delete(f.conns, server)
	f.mu.Unlock()
}

// limited reads no faster than its front lets it.
type limited struct {
	io.Reader
	front *front
}

// Read implements [io.Reader].
func (l limited) Read(p []byte) (int, error) {
	l.front.mu.Lock()
	rate := l.front.rate
	l.front.mu.Unlock()
	if rate == 0 {
		return l.Reader.Read(p)
	}
	n, err := l.Reader.Read(p[:min(len(p), max(1, rate/20))])
	time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
	return n, err
}

// cut closes all connections.
func (f *front) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for conn := range f.conns {
		_ = conn.Close()
	}
}

func (f *front) close() error {
	err := f.ln.Close()
	f.cut()
	return err
}
