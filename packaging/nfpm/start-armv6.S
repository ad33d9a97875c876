/*
 * The start of a program that is linked against the C library's shared object alone, for ARMv6 with VFPv2. The kernel
 * enters _start with the count of arguments, the arguments, and the environment on the stack, and the dynamic linker
 * with the function in r0 that the program is to call at its end.
 *
 * __libc_start_main(main, argc, argv, init, fini, rtld_fini, stack_end); since glibc 2.34 it runs the constructors
 * itself where init is null.
 */
	.syntax unified
	.arch armv6
	.fpu vfp
	.arm
	.text
	.globl _start
	.type _start, %function
_start:
	mov fp, #0
	mov lr, #0
	pop {r1}		@ argc
	mov r2, sp		@ argv
	push {r2}		@ stack_end
	push {r0}		@ rtld_fini
	mov r3, #0		@ fini
	push {r3}
	ldr r0, =main
	bl __libc_start_main	@ init is r3
	bl abort
	.size _start, .-_start
	.section .note.GNU-stack, "", %progbits
