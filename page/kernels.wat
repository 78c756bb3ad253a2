;; The products of the page, in WebAssembly's text format; kernels.js has the first in JavaScript.
;; kernels.wasm is this file, assembled (docs/development.md has the command); a test compares the two.

(module
  (import "page" "memory" (memory 1))

  ;; Returns the sum of the four numbers of a vector.
  (func $sum (param $v v128) (result f32)
    (f32.add
      (f32.add (f32x4.extract_lane 0 (local.get $v)) (f32x4.extract_lane 1 (local.get $v)))
      (f32.add (f32x4.extract_lane 2 (local.get $v)) (f32x4.extract_lane 3 (local.get $v)))))

  ;; y[i * y_stride] = the dot product of x and rows[i], i from 0 to count - 1.
  ;; Addresses and strides are in bytes; x and each row have `length` numbers.
  ;; Four rows at a time: x is loaded once for the four, and their sums do not wait for each other.
  (func (export "multiply")
    (param $x i32) (param $rows i32) (param $y i32) (param $count i32) (param $length i32)
    (param $row_stride i32) (param $y_stride i32)
    (local $row1 i32) (local $row2 i32) (local $row3 i32)
    (local $k i32) (local $whole i32) (local $end i32)
    (local $sum0 v128) (local $sum1 v128) (local $sum2 v128) (local $sum3 v128) (local $four v128)
    (local $tail0 f32) (local $tail1 f32) (local $tail2 f32) (local $tail3 f32) (local $one f32)

    ;; Bytes of a row, and of the part of it that fills whole vectors.
    (local.set $end (i32.shl (local.get $length) (i32.const 2)))
    (local.set $whole (i32.and (local.get $end) (i32.const -16)))

    (block $done
      (loop $next
        (br_if $done (i32.le_s (local.get $count) (i32.const 0)))
        ;; If fewer than four rows are left, the others repeat the first.
        (local.set $row1 (local.get $rows))
        (local.set $row2 (local.get $rows))
        (local.set $row3 (local.get $rows))
        (if (i32.gt_s (local.get $count) (i32.const 1)) (then
          (local.set $row1 (i32.add (local.get $rows) (local.get $row_stride)))))
        (if (i32.gt_s (local.get $count) (i32.const 2)) (then
          (local.set $row2 (i32.add (local.get $row1) (local.get $row_stride)))))
        (if (i32.gt_s (local.get $count) (i32.const 3)) (then
          (local.set $row3 (i32.add (local.get $row2) (local.get $row_stride)))))

        (local.set $sum0 (v128.const f32x4 0 0 0 0))
        (local.set $sum1 (v128.const f32x4 0 0 0 0))
        (local.set $sum2 (v128.const f32x4 0 0 0 0))
        (local.set $sum3 (v128.const f32x4 0 0 0 0))
        (local.set $k (i32.const 0))
        (block $vectors_done
          (loop $vectors
            (br_if $vectors_done (i32.ge_u (local.get $k) (local.get $whole)))
            (local.set $four (v128.load align=4 (i32.add (local.get $x) (local.get $k))))
            (local.set $sum0 (f32x4.add (local.get $sum0) (f32x4.mul (local.get $four)
              (v128.load align=4 (i32.add (local.get $rows) (local.get $k))))))
            (local.set $sum1 (f32x4.add (local.get $sum1) (f32x4.mul (local.get $four)
              (v128.load align=4 (i32.add (local.get $row1) (local.get $k))))))
            (local.set $sum2 (f32x4.add (local.get $sum2) (f32x4.mul (local.get $four)
              (v128.load align=4 (i32.add (local.get $row2) (local.get $k))))))
            (local.set $sum3 (f32x4.add (local.get $sum3) (f32x4.mul (local.get $four)
              (v128.load align=4 (i32.add (local.get $row3) (local.get $k))))))
            (local.set $k (i32.add (local.get $k) (i32.const 16)))
            (br $vectors)))

        (local.set $tail0 (call $sum (local.get $sum0)))
        (local.set $tail1 (call $sum (local.get $sum1)))
        (local.set $tail2 (call $sum (local.get $sum2)))
        (local.set $tail3 (call $sum (local.get $sum3)))
        (block $tail_done
          (loop $tail
            (br_if $tail_done (i32.ge_u (local.get $k) (local.get $end)))
            (local.set $one (f32.load (i32.add (local.get $x) (local.get $k))))
            (local.set $tail0 (f32.add (local.get $tail0) (f32.mul (local.get $one)
              (f32.load (i32.add (local.get $rows) (local.get $k))))))
            (local.set $tail1 (f32.add (local.get $tail1) (f32.mul (local.get $one)
              (f32.load (i32.add (local.get $row1) (local.get $k))))))
            (local.set $tail2 (f32.add (local.get $tail2) (f32.mul (local.get $one)
              (f32.load (i32.add (local.get $row2) (local.get $k))))))
            (local.set $tail3 (f32.add (local.get $tail3) (f32.mul (local.get $one)
              (f32.load (i32.add (local.get $row3) (local.get $k))))))
            (local.set $k (i32.add (local.get $k) (i32.const 4)))
            (br $tail)))

        (f32.store (local.get $y) (local.get $tail0))
        (local.set $y (i32.add (local.get $y) (local.get $y_stride)))
        (if (i32.gt_s (local.get $count) (i32.const 1)) (then
          (f32.store (local.get $y) (local.get $tail1))
          (local.set $y (i32.add (local.get $y) (local.get $y_stride)))))
        (if (i32.gt_s (local.get $count) (i32.const 2)) (then
          (f32.store (local.get $y) (local.get $tail2))
          (local.set $y (i32.add (local.get $y) (local.get $y_stride)))))
        (if (i32.gt_s (local.get $count) (i32.const 3)) (then
          (f32.store (local.get $y) (local.get $tail3))
          (local.set $y (i32.add (local.get $y) (local.get $y_stride)))))

        (local.set $rows (i32.add (local.get $row3) (local.get $row_stride)))
        (local.set $count (i32.sub (local.get $count) (i32.const 4)))
        (br $next))))

  ;; The same for rows of float16 numbers, one after another; `length` is a multiple of 8.
  ;; A float16 with its sign extended to 32 bits, shifted left by 13 and masked, has sign, exponent
  ;; and fraction in the places of a float32 that is 2^112 times smaller.
  (func (export "multiply_halves")
    (param $x i32) (param $rows i32) (param $y i32) (param $count i32) (param $length i32)
    (local $k i32) (local $end i32) (local $low v128) (local $high v128)
    (local $sum0 v128) (local $sum1 v128)

    (local.set $end (i32.shl (local.get $length) (i32.const 2))) ;; bytes of x
    (block $done
      (loop $next
        (br_if $done (i32.le_s (local.get $count) (i32.const 0)))
        (local.set $sum0 (v128.const f32x4 0 0 0 0))
        (local.set $sum1 (v128.const f32x4 0 0 0 0))
        (local.set $k (i32.const 0))
        (block $row_done
          (loop $eight
            (br_if $row_done (i32.ge_u (local.get $k) (local.get $end)))
            (local.set $low (v128.and (v128.const i32x4 0x8fffe000 0x8fffe000 0x8fffe000 0x8fffe000)
              (i32x4.shl (v128.load16x4_s align=2 (local.get $rows)) (i32.const 13))))
            (local.set $high (v128.and (v128.const i32x4 0x8fffe000 0x8fffe000 0x8fffe000 0x8fffe000)
              (i32x4.shl (v128.load16x4_s offset=8 align=2 (local.get $rows)) (i32.const 13))))
            ;; 0x1p112 makes up for the exponent.
            (local.set $sum0 (f32x4.add (local.get $sum0)
              (f32x4.mul (v128.load align=4 (i32.add (local.get $x) (local.get $k)))
                (f32x4.mul (local.get $low) (v128.const f32x4 0x1p112 0x1p112 0x1p112 0x1p112)))))
            (local.set $sum1 (f32x4.add (local.get $sum1)
              (f32x4.mul (v128.load offset=16 align=4 (i32.add (local.get $x) (local.get $k)))
                (f32x4.mul (local.get $high) (v128.const f32x4 0x1p112 0x1p112 0x1p112 0x1p112)))))
            (local.set $rows (i32.add (local.get $rows) (i32.const 16)))
            (local.set $k (i32.add (local.get $k) (i32.const 32)))
            (br $eight)))
        (f32.store (local.get $y) (call $sum (f32x4.add (local.get $sum0) (local.get $sum1))))
        (local.set $y (i32.add (local.get $y) (i32.const 4)))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $next)))))
