// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
)

// Config says how to run a kubelet endpoint.
type Config struct {
	// Dir is the folder for the pods' files and logs. It is created if necessary,
	// and stays when the server stops.
	Dir string

	// Certificate is the endpoint's certificate. It should be valid for 127.0.0.1.
	Certificate tls.Certificate

	// ClientCA is the authority whose client certificates are accepted.
	ClientCA *x509.CertPool
}

// Server is a running kubelet endpoint.
type Server struct {
	dir      string
	http     *http.Server
	listener *listener
	runtime  *runtime

	ctx    context.Context // cancelled by Stop
	cancel context.CancelFunc
	work   sync.WaitGroup // the HTTP server and open requests

	mu      sync.Mutex
	stopped bool
	pods    map[podKey]*pod
}

// Start starts a kubelet endpoint on a free port of the loopback interface.
func Start(cfg Config) (*Server, error) {
	if cfg.ClientCA == nil {
		return nil, errors.New("start kubelet: no authority for client certificates")
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("start kubelet: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("start kubelet: %w", err)
	}
	logFile, err := os.OpenFile(filepath.Join(dir, "kubelet.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start kubelet: %w", err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start kubelet: %w", err), logFile.Close())
	}
	s := &Server{
		dir:      dir,
		listener: newListener(tcp),
		pods:     make(map[podKey]*pod),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.http = &http.Server{
		Handler:     s.handler(),
		ErrorLog:    log.New(logFile, "", log.LstdFlags),
		ConnContext: withConn,
		Protocols:   new(http.Protocols),
		TLSConfig: &tls.Config{
			Certificates: []tls.Certificate{cfg.Certificate},
			ClientAuth:   tls.RequireAndVerifyClientCert,
			ClientCAs:    cfg.ClientCA,
		},
	}
	// Streams hijack connections, which HTTP/2 does not support.
	s.http.Protocols.SetHTTP1(true)
	if err := s.startRuntime(); err != nil {
		return nil, errors.Join(fmt.Errorf("start kubelet: %w", err), tcp.Close(), logFile.Close())
	}
	s.work.Go(func() {
		defer logFile.Close()
		if err := s.http.ServeTLS(s.listener, "", ""); !errors.Is(err, http.ErrServerClosed) {
			s.http.ErrorLog.Printf("serve: %v", err)
		}
	})
	return s, nil
}

// Port returns the port that the endpoint listens on.
func (s *Server) Port() int { return s.listener.Addr().(*net.TCPAddr).Port }

// LogPath returns the file that the endpoint logs to.
func (s *Server) LogPath() string { return filepath.Join(s.dir, "kubelet.log") }

// AddPod starts a pod whose only container runs command, and returns when the
// process runs. The command must not be empty.
func (s *Server) AddPod(namespace, name, container string, command []string) error {
	key := podKey{namespace, name}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return fmt.Errorf("add pod %v: the kubelet is stopped", key)
	}
	if _, ok := s.pods[key]; ok {
		return fmt.Errorf("add pod %v: already exists", key)
	}
	p, err := startPod(filepath.Join(s.dir, namespace+"_"+name), name, container, command)
	if err != nil {
		return fmt.Errorf("add pod %v: %w", key, err)
	}
	s.pods[key] = p
	return nil
}

// RemovePod kills the pod's processes, including those of exec, and waits until they
// have ended. It does nothing if the pod does not exist.
func (s *Server) RemovePod(namespace, name string) {
	s.mu.Lock()
	p := s.pods[podKey{namespace, name}]
	delete(s.pods, podKey{namespace, name})
	s.mu.Unlock()
	if p != nil {
		p.stop()
	}
}

// Stop closes the endpoint and every connection, kills every process, and waits
// until all of them have ended.
func (s *Server) Stop() error {
	s.mu.Lock()
	s.stopped = true
	pods := s.pods
	s.pods = nil
	s.mu.Unlock()

	s.cancel()
	err := errors.Join(s.http.Close(), s.runtime.stop())
	s.listener.closeConns() // http.Server does not close hijacked ones
	for _, p := range pods {
		p.stop()
	}
	s.work.Wait()
	if err != nil {
		return fmt.Errorf("stop kubelet: %w", err)
	}
	return nil
}

// pod returns the pod with the given container.
func (s *Server) pod(key podKey, container string) (*pod, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pods[key]
	if p == nil {
		return nil, fmt.Errorf("pod %v does not exist", key)
	}
	if container != "" && container != p.container {
		return nil, fmt.Errorf("pod %v has no container %q", key, container)
	}
	return p, nil
}
