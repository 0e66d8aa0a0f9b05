// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"crypto/rand"
	"errors"
	"net"
	"net/http"
	"net/url"

	"k8s.io/apimachinery/pkg/util/proxy"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"
)

// A kubelet does not run the streams of exec, attach and port-forward itself. It passes
// them on to the streaming server of its container runtime, on loopback, with the proxy
// that API servers use too. That proxy closes both connections when either direction ends,
// also if it ends because nothing takes the input any more.

// runtime is the streaming server.
type runtime struct {
	handler  http.Handler
	http     *http.Server
	listener *listener
	// url is its address, and a token: other users of the machine can connect to it.
	url *url.URL
}

// startRuntime starts the streaming server of s.
func (s *Server) startRuntime() error {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	// An API server keeps the client's method: POST for SPDY, GET for WebSocket.
	for _, method := range []string{"GET", "POST"} {
		mux.HandleFunc(method+" /exec/{namespace}/{pod}/{container}", s.serveExec)
		mux.HandleFunc(method+" /attach/{namespace}/{pod}/{container}", s.serveAttach)
		mux.HandleFunc(method+" /portForward/{namespace}/{pod}", s.servePortForward)
	}
	token := "/" + rand.Text()
	s.runtime = &runtime{
		handler:  mux,
		http:     &http.Server{Handler: s.counted(http.StripPrefix(token, mux)), ErrorLog: s.http.ErrorLog, ConnContext: withConn},
		listener: newListener(tcp),
		url:      &url.URL{Scheme: "http", Host: tcp.Addr().String(), Path: token},
	}
	s.work.Go(func() {
		if err := s.runtime.http.Serve(s.runtime.listener); !errors.Is(err, http.ErrServerClosed) {
			s.http.ErrorLog.Printf("serve streams: %v", err)
		}
	})
	return nil
}

// stop closes the streaming server and every connection.
func (r *runtime) stop() error {
	err := r.http.Close()
	r.listener.closeConns() // http.Server does not close hijacked ones
	return err
}

// passOn passes a request for a stream on to the streaming server.
func (s *Server) passOn(w http.ResponseWriter, r *http.Request) {
	if !httpstream.IsUpgradeRequest(r) {
		s.runtime.handler.ServeHTTP(w, r) // which says what is wrong with it
		return
	}
	location := s.runtime.url.JoinPath(r.URL.EscapedPath())
	location.RawQuery = r.URL.RawQuery
	// It logs each connection that it resets.
	r = r.WithContext(klog.NewContext(r.Context(), klog.Logger{}))
	proxy.NewUpgradeAwareHandler(location, nil, false, true, responder{}).ServeHTTP(w, r)
}

// responder answers requests that cannot be passed on.
type responder struct{}

// Error implements [proxy.ErrorResponder].
func (responder) Error(w http.ResponseWriter, _ *http.Request, err error) {
	http.Error(w, err.Error(), http.StatusInternalServerError)
}
